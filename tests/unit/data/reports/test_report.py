"""The report of a file: what it counts, what it finds twice, and what it shows."""

import json
import tracemalloc

import pytest

from luthier.core.errors import BaseUnavailableError, UnavailableError
from luthier.data.rendering.tokenizer import Tokenizer
from luthier.data.reports.process import report_in_process
from luthier.data.reports.report import MAX_FAULTS, MAX_SHOWN_CHARS, report_on_file
from tests.rows import chat_row, colour_rows, jsonl, preference_row, read_line
from tests.tiny import build_tiny_base

SEA = "the sea is blue and wide and full of fish that swim in the water all day and all of the night too"


@pytest.fixture
def report(tmp_path, base):
    def make(rows, validation=None, folder=base):
        paths = []
        for name, given in (("rows", rows), ("validation", validation)):
            path = tmp_path / name
            if given is not None:
                path.write_bytes(given if isinstance(given, bytes) else jsonl(given))
                paths.append(path)
        return report_on_file(
            paths[0], folder, context_length=256, validation_path=paths[1] if validation else None
        )

    return make


def test_tokens_are_counted_as_prepare_counts_them(report, base, tmp_path):
    from luthier.data.prepare.preparation import prepare_rows

    rows = [*colour_rows(300), chat_row("what?", "a longer answer " * 9)]
    found = report(rows)
    prepared, counted = prepare_rows(
        tmp_path / "rows", base, max_length=10_000, too_long="error", purpose="training"
    )
    assert (found.format, found.rows, found.num_faults) == ("chat", 301, 0)
    assert found.tokens.total == counted.num_tokens
    assert found.tokens.supervised == counted.num_supervised_tokens
    assert found.tokens.supervised_share == pytest.approx(counted.num_supervised_tokens / counted.num_tokens)
    lengths = sorted(prepared.lengths.tolist())
    assert (found.tokens.max, found.tokens.median) == (lengths[-1], lengths[150])
    assert found.tokens.mean == pytest.approx(sum(lengths) / 301)
    assert (found.tokens.longest[0].line, len(found.tokens.longest)) == (301, 10)
    assert sum(one.rows for one in found.tokens.histogram) == 301
    for one in found.tokens.histogram:
        assert one.rows == sum(one.start <= length < one.end for length in lengths)


def test_the_first_rows_are_shown_with_what_is_learnt(report, base):
    found = report([chat_row("what is the colour?", "blue"), *colour_rows(20)])
    assert [one.line for one in found.shown] == [1, 2, 3, 4, 5]
    first = found.shown[0]
    assert first.text.startswith("<|im_start|>system\nBe brief.<|im_end|>")
    assert [first.text[start:end] for start, end in first.supervised] == ["blue<|im_end|>"]
    assert not first.is_cut


def test_a_long_text_is_shown_cut(report):
    [shown] = report([chat_row("x" * MAX_SHOWN_CHARS, "y")]).shown
    assert (len(shown.text), shown.is_cut, shown.supervised) == (MAX_SHOWN_CHARS, True, [])


def test_exact_and_near_duplicates_are_reported_by_their_lines(report):
    rows = [*colour_rows(10), chat_row(SEA, "yes"), chat_row(f"{SEA}!", "yes"), *colour_rows(3)]
    found = report(rows).duplicates
    assert (found.exact.rows, [(one.line, one.other) for one in found.exact.pairs]) == (
        3,
        [(13, 1), (14, 2), (15, 3)],
    )
    assert (found.near.rows, [(one.line, one.other) for one in found.near.pairs]) == (1, [(12, 11)])


def test_rows_that_the_validation_file_has_too_are_reported(report):
    rows = [*colour_rows(10), chat_row(SEA, "yes")]
    assert report(rows).overlap is None
    found = report(rows, validation=[chat_row(f"{SEA}?", "yes"), *colour_rows(2)]).overlap
    assert [(one.line, one.other) for one in found.exact.pairs] == [(1, 2), (2, 3)]
    assert [(one.line, one.other) for one in found.near.pairs] == [(11, 1)]


def test_a_template_without_a_place_for_the_system_is_a_fault_of_the_line(report, tmp_path):
    folder = build_tiny_base(tmp_path / "base")
    template = folder / "chat_template.jinja"
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    template.write_text(refusal + template.read_text())
    with_system = chat_row("q", "a")
    with_system["messages"].insert(0, {"role": "system", "content": "s"})
    found = report([*colour_rows(3), with_system, *colour_rows(3)], folder=folder)
    [fault] = found.faults
    assert (fault.line, fault.field, fault.rule) == (4, "messages", "row.template")
    assert "no system turn" in fault.advice
    assert (found.rows, found.rows_with_faults, found.tokens.longest[0].line) == (7, 1, 1)


def test_a_row_that_teaches_nothing_is_a_fault(report):
    [fault] = report([*colour_rows(2), chat_row("q", "a", weight=0)]).faults
    assert (fault.line, fault.rule) == (3, "row.nothing_supervised")


def test_of_many_faults_the_first_hundred_are_reported_and_all_counted(report):
    found = report([chat_row("q", f"a {number}", weight=0) for number in range(150)])
    assert (len(found.faults), found.num_faults, found.rows_with_faults) == (MAX_FAULTS, 150, 150)


def test_a_preference_is_shown_with_both_conversations(report):
    found = report([preference_row("q", "good", "bad")])
    [shown] = found.shown
    assert found.format == "preference"
    for one, text in ((shown, "good<|im_end|>"), (shown.rejected, "bad<|im_end|>")):
        assert [one.text[start:end] for start, end in one.supervised] == [text]


def test_raw_texts_are_learnt_without_a_template_and_end(report, base):
    found = report(b"prompt,completion\nthe sky is,blue\n")
    [shown] = found.shown
    assert shown.text == "the sky isblue<|im_end|>"
    assert [shown.text[start:end] for start, end in shown.supervised] == ["blue<|im_end|>"]
    [shown] = report([{"text": "the sky"}]).shown
    assert shown.supervised == [(0, len("the sky<|im_end|>"))]


def test_a_prompt_s_tokens_are_those_that_it_is_asked_with(base):
    from luthier.data.formats.completion import FORMAT
    from luthier.data.rendering.chat_template import ChatTemplate
    from luthier.data.rendering.loss_mask import encode_rows, render_row

    tokenizer = Tokenizer.load(base)
    row = read_line(FORMAT, json.dumps({"prompt": "the an", "completion": "swer is"}).encode())
    [encoding] = encode_rows(tokenizer, [render_row(ChatTemplate.load(base), row)])
    num_prompt = len(tokenizer.encode("the an"))
    assert encoding.ids[:num_prompt].tolist() == tokenizer.encode("the an")
    assert encoding.spans[num_prompt].tolist()[0] == len("the an")


def test_memory_does_not_grow_with_the_rows(report):
    def peak_bytes(num_rows):
        tracemalloc.start()
        report(colour_rows(num_rows))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return peak

    peak_bytes(300)
    assert peak_bytes(1500) - peak_bytes(500) < 4 * 1024 * 1024


def test_a_process_says_what_is_wrong_with_a_base_and_where_it_failed_without_the_text(base, tmp_path, capfd):
    def report(path, folder, is_given_up=lambda: False):
        limits = {"context_length": 256, "max_seconds": 60, "is_given_up": is_given_up}
        return report_in_process(path, folder, validation_path=None, **limits)

    path = tmp_path / "rows"
    path.write_bytes(jsonl(colour_rows(9)))
    assert report(path, base) == report_on_file(path, base, context_length=256)
    with pytest.raises(BaseUnavailableError, match="no chat template"):
        report(path, tmp_path)
    with pytest.raises(RuntimeError, match=r"failed with IsADirectoryError at \S+\.py:\d+ \w+\.$"):
        report(tmp_path, base)
    with pytest.raises(FileNotFoundError):
        report(tmp_path / "none", base)
    with pytest.raises(UnavailableError):
        report(path, base, is_given_up=lambda: True)
    assert not any("Traceback" in printed for printed in capfd.readouterr())


def test_all_faults_of_an_array_name_row_and_line(report):
    rows = [chat_row("q", "a"), chat_row("q", "b", weight=0), {"messages": []}]
    found = report(("[\n\n" + ",\n".join(json.dumps(row) for row in rows) + "]").encode())
    assert [(one.row, one.line) for one in found.faults] == [(2, 4), (3, 5)]
    assert found.rows_with_faults == 2
