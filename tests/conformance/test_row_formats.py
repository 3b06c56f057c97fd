"""What every row format keeps, found by its file in luthier/data/formats."""

import pytest

from luthier.data.formats import discover
from luthier.data.formats.base import Fault

GARBAGE = [b"", b"{", b"[]", b"null", b"\xff\xfe", b"{}", b"[" * 10_000, b'{"\\ud800": 1}', b"\0"]


@pytest.fixture(params=sorted(discover()))
def row_format(request):
    return discover()[request.param]


def test_formats_are_found_by_their_own_name(row_format):
    assert discover()[row_format.name] is row_format


@pytest.mark.parametrize("line", GARBAGE)
def test_what_is_no_row_is_refused_and_explained_with_its_line(row_format, line):
    assert row_format.read(line) is None
    faults = row_format.explain(line, 12)
    assert faults
    assert all(isinstance(fault, Fault) and fault.line == 12 and fault.rule for fault in faults)
