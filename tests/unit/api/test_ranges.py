"""Ranges as RFC 9110, section 14, has them; the first four rows are its own examples."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.streaming.byte_ranges import parse_range
from luthier.core.errors import RangeNotSatisfiableError


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("bytes=0-499", (0, 500)),
        ("bytes=500-999", (500, 1000)),
        ("bytes=-500", (9500, 10000)),
        ("bytes=9500-", (9500, 10000)),
        ("bytes=0-", (0, 10000)),
        ("bytes=9999-9999", (9999, 10000)),
        ("bytes=9999-99999999999999999999999", (9999, 10000)),
        ("bytes=-99999999999999999999999", (0, 10000)),
        ("Bytes= 0-1 ", (0, 2)),
        ("bytes=,0-1", (0, 2)),
    ],
)
def test_one_range_is_read(header, expected):
    assert parse_range(header, 10000) == expected


@pytest.mark.parametrize(
    "header",
    [
        "bytes=0-0,-1",
        "bytes=500-600, 601-999",
        "items=0-5",
        "bytes",
        "bytes=",
        "bytes=-",
        "bytes=5-3",
        "bytes=a-b",
        "bytes=0x1-5",
        "bytes=1-2-3",
        "bytes=--5",
        "bytes=٣-٤",
        "bytes=" + "9" * 5000 + "-",
    ],
)
def test_what_is_no_single_range_is_answered_whole(header):
    assert parse_range(header, 10000) is None


@pytest.mark.parametrize(
    ("header", "size_bytes"),
    [("bytes=99-", 99), ("bytes=99-100", 99), ("bytes=-0", 99), ("bytes=0-", 0), ("bytes=-5", 0)],
)
def test_a_range_without_a_byte_is_refused(header, size_bytes):
    with pytest.raises(RangeNotSatisfiableError):
        parse_range(header, size_bytes)


@given(st.integers(0, 30), st.integers(0, 30), st.integers(1, 30))
def test_a_range_is_the_slice_that_it_names(first, last, size_bytes):
    content = bytes(range(size_bytes))
    expected = content[first : last + 1]
    try:
        found = parse_range(f"bytes={first}-{last}", size_bytes)
    except RangeNotSatisfiableError:
        assert expected == b""
    else:
        assert (found is None) == (last < first)
        assert found is None or content[found[0] : found[1]] == expected
