"""The bundled data set: what the files promise about themselves and each other."""

import json
import re

import pytest

from examples.support import generate
from examples.support.generate import FOLDER, NUM_ROWS, SYSTEM, Row, make_data_set
from examples.support.score import ALLOWED, KEYS, parse_answer
from luthier.data.readers.base import Limits
from luthier.data.readers.file_checker import check_rows

FILES = ("train", "validation", "heldout")


@pytest.fixture(scope="module")
def rows() -> dict[str, list[Row]]:
    return make_data_set()


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


def _runs_of_six(rows: list[Row]) -> set[tuple[str, ...]]:
    runs = set()
    for row in rows:
        words = _words(row.message)
        runs |= {tuple(words[start : start + 6]) for start in range(len(words) - 5)}
    return runs


@pytest.mark.parametrize("name", FILES)
def test_the_committed_file_is_what_the_generator_writes(rows: dict[str, list[Row]], name: str) -> None:
    committed = (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8")
    assert committed == "".join(f"{row.to_line()}\n" for row in rows[name])


def test_the_generator_is_repeatable_and_its_seed_matters(rows: dict[str, list[Row]]) -> None:
    assert make_data_set() == rows
    assert make_data_set(generate.SEED + 1)["train"] != rows["train"]


@pytest.mark.parametrize("name", FILES)
def test_the_service_accepts_every_file(name: str) -> None:
    content = (FOLDER / f"{name}.jsonl").read_bytes()
    assert check_rows([content], Limits(1024 * 1024)).num_rows == NUM_ROWS[name]


def test_there_are_enough_rows() -> None:
    assert NUM_ROWS["train"] >= 240
    assert NUM_ROWS["heldout"] >= 60


def test_heldout_rows_share_no_name_instrument_or_sentence_with_the_others(
    rows: dict[str, list[Row]],
) -> None:
    known, heldout = rows["train"] + rows["validation"], rows["heldout"]
    assert not {row.name for row in known} & {row.name for row in heldout}
    known_things = {word for row in known for word in row.thing.split()}
    assert not known_things & {word for row in heldout for word in row.thing.split()}
    assert not {text for row in known for text in row.sentences} & {
        text for row in heldout for text in row.sentences
    }


def test_heldout_messages_share_no_run_of_six_words_with_the_others(rows: dict[str, list[Row]]) -> None:
    heldout = _runs_of_six(rows["heldout"])
    assert len(heldout) > 500
    assert not heldout & _runs_of_six(rows["train"] + rows["validation"])


def test_no_message_comes_twice_and_validation_customers_are_not_in_training(
    rows: dict[str, list[Row]],
) -> None:
    messages = [row.message for name in FILES for row in rows[name]]
    assert len(set(messages)) == len(messages)
    assert not {row.name for row in rows["train"]} & {row.name for row in rows["validation"]}


@pytest.mark.parametrize("name", FILES)
def test_every_reference_is_valid_and_answers_its_own_message(rows: dict[str, list[Row]], name: str) -> None:
    for row in rows[name]:
        answer = parse_answer(row.answer)
        assert answer is not None
        assert row.name in answer["reply"] and row.name in row.message and row.thing in row.message
        assert answer["reply"].endswith(". Warmly, the bench")
        assert len(answer["reply"].split()) <= 15 and "\n" not in answer["reply"]


@pytest.mark.parametrize("name", ("train", "heldout"))
def test_every_value_of_every_label_is_there_about_equally_often(
    rows: dict[str, list[Row]], name: str
) -> None:
    for key, allowed in ALLOWED.items():
        found = [json.loads(row.answer)[key] for row in rows[name]]
        assert set(found) == allowed
        fair = len(found) / len(allowed)
        assert all(0.5 * fair <= found.count(value) <= 1.5 * fair for value in allowed)


def test_the_system_turn_says_nothing_of_the_structure() -> None:
    # "return" is left out: no key, and too common a word to prove anything.
    secret = {*KEYS, *(value for allowed in ALLOWED.values() for value in allowed), "json", "object"}
    assert not set(_words(SYSTEM)) & secret
