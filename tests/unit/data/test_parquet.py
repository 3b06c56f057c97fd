"""Parquet: read from the whole file, row by row, with what its columns can't say put right."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from luthier.core.errors import InvalidFileFormatError
from luthier.data.formats import discover
from luthier.data.rows import FileRows
from luthier.data.validate import FileChecker

USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a", "weight": 1}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def write(path, table, **options):
    pq.write_table(table if isinstance(table, pa.Table) else pa.Table.from_pylist(table), path, **options)
    return path


def check(path, **limits):
    checker = FileChecker(**limits)
    checker.feed(path.read_bytes())
    assert checker.needs_file
    return checker.finish(path)


def test_rows_with_nulls_where_a_key_is_absent_are_read(tmp_path):
    calling = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    told = {"role": "tool", "content": "7", "tool_call_id": "c"}
    rows = [{"messages": [USER, ANSWER]}, {"messages": [USER, calling, told, ANSWER]}]
    path = write(tmp_path / "rows", rows * 300, row_group_size=7)
    facts = check(path)
    assert (facts.num_rows, facts.format, facts.container) == (600, "chat", "parquet")
    found = list(FileRows(path))
    assert [number for number, _ in found] == list(range(1, 601))
    expected = [discover()["chat"].read(json.dumps(row).encode()) for row in rows]
    assert [row for _, row in found[:2]] == expected


def test_texts_that_hold_json_are_read_as_such(tmp_path):
    path = write(tmp_path / "rows", [{"messages": json.dumps([USER, ANSWER])}])
    assert check(path).format == "chat"
    path = write(tmp_path / "rows", [{"messages": "[1"}])
    with pytest.raises(
        InvalidFileFormatError, match='Row 1, messages: The text in the column "messages" must'
    ):
        check(path)


def test_faults_are_told_by_the_row_s_number(tmp_path):
    rows = [{"prompt": "p", "completion": "c"}] * 9 + [{"prompt": "p", "completion": ""}]
    with pytest.raises(InvalidFileFormatError, match=r"^Row 10, completion: "):
        check(write(tmp_path / "rows", rows, row_group_size=4))


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([{"prompt": "p", "completion": "c", "id": 1}], "Row 1, column 3, id: Unknown column"),
        ([{"prompt": "p"}], 'Row 1, completion: The column "completion" is missing'),
        ([{"question": "p"}], "Row 1: No column has the name"),
        ([{"text": b"\xff"}], "Row 1, text: A text of the row is not UTF-8"),
    ],
)
def test_columns_that_no_format_has_are_told_once(tmp_path, rows, told):
    with pytest.raises(InvalidFileFormatError) as caught:
        check(write(tmp_path / "rows", rows * 30))
    assert told in caught.value.message


def test_a_file_that_was_cut_is_refused(tmp_path):
    path = write(tmp_path / "rows", [{"text": "t"}] * 50)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InvalidFileFormatError, match="damaged or was cut"):
        check(path)


def test_a_column_of_equal_values_can_not_expand_without_bound(tmp_path):
    path = write(tmp_path / "rows", pa.table({"text": pa.array(["x" * 5000] * 20_000)}))
    assert path.stat().st_size < 100_000
    with pytest.raises(InvalidFileFormatError, match="expands to more than 16777216 bytes"):
        check(path)


def test_a_caller_without_the_whole_file_is_told(tmp_path):
    checker = FileChecker()
    checker.feed(write(tmp_path / "rows", [{"text": "t"}]).read_bytes())
    with pytest.raises(InvalidFileFormatError, match="Parquet"):
        checker.finish()
