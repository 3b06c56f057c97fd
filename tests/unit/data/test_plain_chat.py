"""The fast lane and the check of single lines say the same of every file, wherever it is cut."""

import itertools
import json
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.core.errors import InvalidFileFormatError
from luthier.data import intake
from luthier.data.intake import RowCheck, RowLimits
from luthier.data.plain_chat import count_plain_rows
from luthier.data.plain_rows import RowCounter
from luthier.data.validate import FileChecker, FileFacts

PLAIN = {"messages": [{"role": "user", "content": 'é 木 "q": \\ \n'}, {"role": "assistant", "content": "b"}]}
SPACED, COMPACT = (
    json.dumps(PLAIN, ensure_ascii=False).encode(),
    json.dumps(PLAIN, separators=(",", ":")).encode(),
)
RICH = json.dumps(
    {
        "messages": [
            {"role": "system", "content": "s", "name": "n"},
            {"role": "user", "content": "u"},
            {"role": "assistant", "content": "a", "weight": 0},
            {"role": "assistant", "content": "b", "name": "n", "weight": 1},
        ]
    }
).encode()


@pytest.mark.parametrize("line", [SPACED, COMPACT, RICH], ids=["spaced", "compact", "rich"])
@pytest.mark.parametrize("newline", [b"\n", b"\r\n"], ids=["lf", "crlf"])
def test_rows_as_programs_write_them_pass_at_once(line: bytes, newline: bytes) -> None:
    assert count_plain_rows((line + newline) * 7) == 7


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{}",
        b"[" + SPACED + b"]",
        SPACED + b" " + SPACED,
        SPACED.replace(b'"messages": ', b'"messages": [], "messages": '),
        SPACED.replace(b'"role": "user", ', b'"role" :"user","role":"user", '),
        SPACED.replace(b'"content": "b"', b'"content": "c", "content": "b"'),
        SPACED.replace(b'"assistant"', b'"user"'),
        SPACED.replace(b'"content": "b"', b'"content": 5'),
        SPACED.replace(b'"content": "b"', b'"content": "b", "weight": 2'),
        SPACED.replace(b'"role": "user", ', b'"role": "user", "weight": 1, '),
        SPACED.replace(b'"content": "b"', b'"content": "b", "name": 1'),
        SPACED.replace(b'"content": "b"', b'"content": "\xff"'),
        SPACED.replace(b'"content": "b"', b'"content": "\xed\xa0\x80"'),
        SPACED.replace(b'"content": "b"', b'"content": "\\ud800"'),
        SPACED.replace(b'"content": "b"', b'"content": "a\tb"'),
        SPACED.replace(b'"content": "b"', b'"content": [{"type": "text", "text": "b"}]'),
        SPACED.replace(b'"role": "user", ', b'"role": "tool", '),
        json.dumps({"messages": []}).encode(),
        json.dumps(PLAIN, indent=1).encode(),
        b"\xef\xbb\xbf" + SPACED,
        b" " + SPACED,
    ],
)
def test_anything_else_is_left_to_the_check_of_single_lines(line: bytes) -> None:
    assert count_plain_rows(b"\n".join([SPACED, line, SPACED, b""])) is None


_PIECES = st.sampled_from(
    [
        SPACED + b"\n",
        COMPACT + b"\n",
        RICH + b"\n",
        SPACED + b"\r\n",
        SPACED,
        SPACED.replace(b'"b"', b'"\xff"') + b"\n",
        SPACED[:40],
        SPACED[40:] + b"\n",
        b"x" * 1500 + b"\n",
        b"{}\n",
        b"\n",
        b" ",
        b"\xff",
    ]
)

SPACED_HEAD = (SPACED + b"\n") * (5000 // len(SPACED))


def _outcome(check: FileChecker | RowCheck, content: bytes, cuts: list[int]) -> FileFacts | str:
    places = [0, *sorted(min(cut, len(content)) for cut in cuts), len(content)]
    try:
        for start, end in itertools.pairwise(places):
            check.feed(content[start:end])
        return check.finish()
    except InvalidFileFormatError as error:
        return error.message


@settings(max_examples=150, deadline=None)
@given(st.lists(_PIECES, max_size=16).map(b"".join), st.lists(st.integers(4000, 9000), max_size=6))
def test_facts_and_faults_are_those_of_the_slow_check_wherever_the_file_is_cut(
    rows: bytes, cuts: list[int]
) -> None:
    for max_line_bytes in (1200, 1 << 20):
        # Behind a head of rows, so that blocks are judged at once.
        content = SPACED_HEAD + rows
        slow = _outcome(FileChecker(max_line_bytes=max_line_bytes), content, [])
        assert _outcome(RowCheck(RowLimits(max_line_bytes, 2**33, 100.0)), content, cuts) == slow


def test_a_line_longer_than_what_is_kept_is_judged_like_any_other() -> None:
    long_row = json.dumps({"messages": [{"role": "assistant", "content": "w" * 3_000_000}]}).encode()
    for content in (
        SPACED_HEAD + long_row + b"\n" + SPACED + b"\n",
        SPACED_HEAD + long_row[:-1] + b"\n" + SPACED + b"\n{}\n",
    ):
        slow = _outcome(FileChecker(), content, [])
        assert (
            _outcome(
                RowCheck(RowLimits(8 << 20, 2**33, 100.0)), content, list(range(4500, 3_100_000, 400_000))
            )
            == slow
        )


def test_a_large_files_rows_are_judged_the_same_by_a_process_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(intake, "_MAX_BYTES_COUNTED_HERE", 0)
    parts = SPACED.replace(b'"content": "b"', b'"content": [{"type": "text", "text": "b"}]') + b"\n"
    broken = SPACED.replace(b'"b"', b'"\xff"') + b"\n"
    for content in (
        SPACED_HEAD * 8 + parts + SPACED_HEAD * 4,
        SPACED_HEAD * 8 + broken + SPACED_HEAD + b"\n" + SPACED_HEAD,
    ):
        check = RowCheck(RowLimits(1 << 20, 2**33, 100.0))
        cuts = list(range(4500, len(content), 3000))
        assert _outcome(check, content, cuts) == _outcome(FileChecker(), content, [])
        check.close()


@pytest.mark.parametrize("end", [RowCounter.close, lambda counter: counter._counting._process.kill()])
def test_blocks_that_a_process_left_uncounted_are_counted_all_the_same(
    end: Callable[[RowCounter], None],
) -> None:
    counter = RowCounter()
    blocks = [(SPACED + b"\n") * 3, SPACED, (COMPACT + b"\n") * 5, b" \n"]
    for block in blocks[:2]:
        counter.put(block)
    assert counter._counting is not None
    process = counter._counting._process
    end(counter)
    for block in blocks[2:]:
        counter.put(block)
    assert [counter.take() for _ in blocks] == list(zip(blocks, [3, None, 5, None], strict=True))
    counter.close()
    assert process.returncode is not None
