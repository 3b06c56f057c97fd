"""Preferences become pairs of rows: one prompt, two answers, the preferred one first."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from luthier.core.errors import InvalidTrainingFileError, InvalidValueError
from luthier.data.prepare.preparation import PreparedReport, prepare_rows
from luthier.data.prepare.prepared_rows import PreparedRows
from luthier.data.prepare.row_counts import count_rows
from luthier.data.prepare.validation_split import split_rows
from luthier.data.rendering.tokenizer import Tokenizer
from tests.rows import preference_row


def prepare(
    tmp_path: Path, base: Path, rows: list[dict[str, Any]], **options: Any
) -> tuple[PreparedRows, PreparedReport]:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"max_length": 256, "too_long": "error", "purpose": "training", "wants_pairs": True} | options
    return prepare_rows(path, base, **given)


def texts(rows: PreparedRows, index: int, base: Path) -> tuple[str, str]:
    """Return what is context and what is learnt of a row."""
    tokens, mask = rows.row(index)
    decode = Tokenizer.load(base).decode
    return tuple(decode(tokens[part].tolist(), skip_special=False) for part in (~mask, mask))


def test_a_pair_is_one_prompt_with_two_answers_the_preferred_one_first(tmp_path, base):
    rows, report = prepare(
        tmp_path, base, [preference_row("the sky?", "blue", "green"), preference_row("a", "b", "c")]
    )
    (prompt, preferred), (same, other) = texts(rows, 0, base), texts(rows, 1, base)
    assert prompt == same
    assert (preferred, other) == ("blue<|im_end|>", "green<|im_end|>")
    assert rows.lines.tolist() == [1, 1, 2, 2]
    assert (report.num_rows, rows.num_rows) == (2, 4)


def test_answers_in_the_input_are_context(tmp_path, base):
    row = preference_row("the sky?", "blue", "green")
    row["input"]["messages"][:0] = [
        {"role": "user", "content": "the sea?"},
        {"role": "assistant", "content": "the same"},
    ]
    rows, _ = prepare(tmp_path, base, [row])
    assert texts(rows, 0, base)[1] == "blue<|im_end|>"


def test_a_pair_is_dropped_or_cut_as_one(tmp_path, base):
    rows = [preference_row("the sky?", "blue", "green " * 30), preference_row("the sky?", "blue", "red")]
    kept, report = prepare(tmp_path, base, rows, max_length=60, too_long="drop")
    assert kept.lines.tolist() == [2, 2]
    assert report.dropped_lines == (1,)
    cut, report = prepare(tmp_path, base, rows, max_length=60, too_long="truncate")
    assert cut.lines.tolist() == [1, 1, 2, 2]
    assert cut.lengths.max() == 60
    assert report.truncated_lines == (1,)


def test_answers_that_differ_only_in_what_is_cut_off_are_a_fault(tmp_path, base):
    same = "blue " * 40
    rows = [preference_row("the sky?", f"{same} yes", f"{same} no")]
    with pytest.raises(InvalidTrainingFileError, match=r"Line 1, non_preferred_output: Cut to 60 tokens"):
        prepare(tmp_path, base, rows, max_length=60, too_long="truncate")
    with pytest.raises(InvalidTrainingFileError, match="no row left"):
        prepare(tmp_path, base, rows, max_length=60, too_long="drop")


def test_a_job_on_preferences_refuses_other_rows_and_the_other_way_round(tmp_path, base):
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    with pytest.raises(InvalidTrainingFileError, match=r"format chat.*method dpo learns from preferences"):
        prepare(tmp_path, base, [chat])
    with pytest.raises(InvalidTrainingFileError, match=r"holds preferences.*method dpo"):
        prepare(tmp_path, base, [preference_row("a", "b", "c")], wants_pairs=False)


def test_a_split_parts_no_pair(tmp_path, base):
    made = [preference_row(f"number {n * n}?", f"it is {n}", f"it is not {n + 1}") for n in range(12)]
    rows, _ = prepare(tmp_path, base, made)
    training, validation = split_rows(rows, 0.25, rows_per_example=2)
    assert (training.num_rows, validation.num_rows) == (18, 6)
    for part in (training, validation):
        assert np.array_equal(part.lines[0::2], part.lines[1::2])
    assert set(training.lines).isdisjoint(validation.lines)


@pytest.mark.parametrize(("too_long", "num_kept"), [("drop", 3), ("truncate", 4)])
def test_an_estimate_counts_the_pairs_and_tokens_that_prepare_finds(tmp_path, base, too_long, num_kept):
    given = [preference_row(f"colour of {n}?", "it is red", f"no idea {n}") for n in range(3)]
    given.append(preference_row("the sky?", "blue " * 40, "green"))
    rows, _ = prepare(tmp_path, base, given, too_long=too_long, max_length=64)
    limits: dict[str, Any] = {
        "num_rows": 4,
        "max_length": 64,
        "too_long": too_long,
        "max_rows": 100,
        "max_seconds": 60.0,
    }
    path = tmp_path / "rows.jsonl"
    counts = count_rows(path, base, wants_pairs=True, **limits)
    assert (counts.num_rows, counts.num_too_long, counts.num_kept) == (4, 1, num_kept)
    assert counts.num_tokens == rows.num_tokens
    assert counts.longest == rows.lengths.max()
    with pytest.raises(InvalidValueError, match="belong to jobs of method dpo") as refused:
        count_rows(path, base, purpose="validation", **limits)
    assert refused.value.param == "validation_file"
