"""What every row format keeps, found by its file in luthier/data/formats."""

import json

import pytest

from luthier.data.formats import discover
from luthier.data.formats.base import Fault, Row
from luthier.data.readers.detect_format import detect_format, find_format
from tests.rows import explain_line, read_line

GARBAGE = [b"", b"{", b"[]", b"null", b"\xff\xfe", b"{}", b"[" * 10_000, b'{"\\ud800": 1}', b"\0"]


@pytest.fixture(params=sorted(discover()))
def row_format(request):
    return discover()[request.param]


def test_formats_are_found_by_their_own_name(row_format):
    assert discover()[row_format.name] is row_format


@pytest.mark.parametrize("line", GARBAGE)
def test_what_is_no_row_is_refused_and_explained_with_its_line(row_format, line):
    assert read_line(row_format, line) is None
    faults = explain_line(row_format, line, 12)
    assert faults
    assert all(isinstance(fault, Fault) and fault.line == 12 and fault.rule for fault in faults)


def sample(row_format):
    """Return a row of a format, made of what the format says of itself."""
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    values = {
        "messages": messages,
        "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
        "input": {"messages": messages[:1]},
        "preferred_output": messages[1:],
        "non_preferred_output": [{"role": "assistant", "content": "b"}],
    }
    return {key: values.get(key, "some text") for key in row_format.signature}


def test_a_row_of_its_signature_is_recognised_and_read(row_format):
    row = sample(row_format)
    line = json.dumps(row).encode()
    assert detect_format(line, 1) is row_format
    assert find_format(row_format.signature) is row_format
    found = read_line(row_format, line)
    assert isinstance(found, Row)
    assert any(turn.is_trained for turn in found.turns)
    assert found.turns[-1].role == "assistant"
    assert row_format.signature <= row_format.keys
    assert row_format.json_keys <= row_format.keys


def test_what_is_accepted_is_read_and_what_is_refused_is_explained(row_format):
    row = sample(row_format)
    broken = [row | {"colour": "red"}]
    broken += [{name: value for name, value in row.items() if name != key} for key in row]
    broken += [row | {key: value} for key in row for value in (None, [], {}, True, 0.5)]
    for one in broken:
        line = json.dumps(one).encode()
        assert read_line(row_format, line) is None, one
        faults = explain_line(row_format, line, 4)
        assert faults
        assert all(fault.line == 4 and fault.field for fault in faults)


def test_no_more_than_forty_characters_of_a_row_are_reported(row_format):
    row = sample(row_format) | {"s" * 500: "t" * 500}
    [*faults] = explain_line(row_format, json.dumps(row).encode(), 1)
    assert faults
    assert not [fault for fault in faults if "s" * 41 in str(fault) or "t" * 41 in str(fault)]
