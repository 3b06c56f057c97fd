import gzip
import itertools
import json
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.core.errors import InvalidFileFormatError
from luthier.data.readers.base import Limits
from luthier.data.readers.file_checker import MAX_FAULTS, FileFacts, check_rows

ROW = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'


def check(content: bytes, *, chunk_bytes: int = 1 << 20, max_line_bytes: int = 4096) -> FileFacts:
    chunks = [content[start : start + chunk_bytes] for start in range(0, len(content), chunk_bytes)]
    return check_rows(chunks, Limits(max_line_bytes))


def outcome(content: bytes, cuts: list[int], max_line_bytes: int = 200) -> FileFacts | str:
    places = [0, *sorted(min(cut, len(content)) for cut in cuts), len(content)]
    try:
        chunks = [content[start:end] for start, end in itertools.pairwise(places)]
        return check_rows(chunks, Limits(max_line_bytes))
    except InvalidFileFormatError as error:
        return error.message


def test_facts_are_the_rows_and_the_bytes_of_the_whole_file():
    content = ROW + b"\n" + ROW + b"\n"
    assert check(content) == FileFacts(2, len(content), "chat")


@pytest.mark.parametrize(
    "content",
    [
        ROW,
        ROW + b"\n",
        ROW + b"\r\n" + ROW + b"\r\n",
        b"\xef\xbb\xbf" + ROW + b"\n",
        ROW + b"\n\n",
        ROW + b"\n \r\n\n",
    ],
    ids=["no final newline", "newline", "crlf", "byte order mark", "blank last line", "blank last lines"],
)
def test_harmless_differences_between_editors_are_accepted(content):
    assert check(content).num_rows == content.count(b"messages")


_FORMATTED = [ROW, b"\n", b"\r\n", b" ", b"{", '{"messages": "é"}'.encode()]
PIECES = st.sampled_from([*_FORMATTED, b"\xff", b"\0", b"x" * 300, b"\xef\xbb\xbf", b"\x1f\x8b"])


@given(st.lists(PIECES, max_size=30).map(b"".join), st.lists(st.integers(0, 3000), max_size=12))
def test_the_result_does_not_depend_on_where_the_chunks_are_cut(content, cuts):
    assert outcome(content, cuts) == outcome(content, [])


@given(st.binary(max_size=200))
def test_any_bytes_give_facts_or_the_one_error(content):
    outcome(content, [])


@pytest.mark.parametrize(
    ("line", "reported"),
    [
        (b'{"messages": [}', "Line 2, column 15"),
        (b'{"messages": "\xff"}', "Line 2, column 15: Byte 15 of the line is not UTF-8"),
        (b"\0" + ROW, "Line 2, column 1: The line holds a NUL byte"),
        (b"[1]", "Line 2: Each line must be a JSON object"),
        (b'{"messages": NaN}', "Line 2: NaN is not JSON"),
        (b'{"messages": [' + b"[" * 100_000, "Line 2: The line is nested too deeply"),
        (b"{" + b'"n":' + b"1" * 5000 + b"}", "Line 2: A number has too many digits"),
        (ROW[:-1] + b', "messages": []}', 'Line 2: The key "messages" appears twice'),
        (b'{"messages": [{"role": "user", "role": "user"}]}', 'Line 2: The key "role" appears twice'),
        (b'{"messages": [{"role": "assistant", "content": "\\ud800"}]}', "Line 2: An escape of half"),
        (b"", "Line 2: The line is blank"),
        (b"y" * 1_000_000, "Line 2: The line is longer than 500000 bytes"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)
def test_a_broken_line_is_reported_with_its_number_and_what_to_do(line, reported):
    with pytest.raises(InvalidFileFormatError) as caught:
        check(b"\n".join([ROW, line, ROW]), max_line_bytes=500_000)
    assert caught.value.message.startswith(reported)
    assert caught.value.param == "file"


@pytest.mark.parametrize(
    ("content", "reported"),
    [
        (gzip.compress(gzip.compress(ROW, mtime=0), mtime=0), "compressed twice"),
        (gzip.compress(b"PAR1rest", mtime=0), "compressed in itself"),
        (gzip.compress(ROW, mtime=0)[:-4], "ends too early"),
        (gzip.compress(ROW, mtime=0) + b"rest", "damaged"),
        (b"PK\x03\x04rest", "zip"),
        (b"PAR1rest", "Parquet"),
        (ROW.decode().encode("utf-16"), "UTF-16"),
        (ROW.decode().encode("utf-16-le"), "NUL byte"),
        (b"[\n" + ROW + b"\n", "not closed"),
        (b"a,b\n1,2\n", "Of a CSV file the first line names"),
        (json.dumps(json.loads(ROW), indent=1).encode(), "indented JSON"),
        (b"", "empty"),
        (b"\n\n", "empty"),
        (b"\xef\xbb\xbf", "empty"),
    ],
)
def test_a_file_of_another_kind_is_named_as_such(content, reported):
    with pytest.raises(InvalidFileFormatError, match=reported):
        check(content)


def test_checking_stops_at_twenty_faults_and_lists_the_first_few():
    with pytest.raises(InvalidFileFormatError) as caught:
        check(b"{}\n" * 1000)
    message = caught.value.message
    assert message.startswith(f"The file breaks the format in {MAX_FAULTS} or more places. Line 1, messages:")
    assert "Line 5," in message
    assert "Line 6," not in message


def test_blank_lines_in_the_middle_are_one_fault_at_the_first_of_them():
    with pytest.raises(InvalidFileFormatError) as caught:
        check(b"\n".join([ROW, b"", b" ", b"", ROW, ROW]))
    assert caught.value.message == "Line 2: The line is blank; remove it."


def test_memory_stays_constant_over_an_endless_line():
    chunk = b"z" * (256 * 1024)
    tracemalloc.start()
    with pytest.raises(InvalidFileFormatError, match="longer than 65536 bytes"):
        check_rows(itertools.repeat(chunk, 200), Limits(64 * 1024))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 2 * 1024 * 1024


def test_a_row_counts_for_200_bytes_of_what_a_file_may_hold():
    row = b'{"text": "t"}\n'
    limits = Limits(max_expanded_bytes=20_000)
    assert check_rows([row * 100], limits).num_rows == 100
    with pytest.raises(InvalidFileFormatError, match="more than 100 rows"):
        check_rows([row * 101], limits)
