"""Parquet: read from the whole file, row by row, with what its columns can't say put right."""

import json
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from luthier.core.errors import InvalidFileFormatError
from luthier.data.formats import discover
from luthier.data.formats.base import Fault
from luthier.data.readers.base import Limits, RawRow
from luthier.data.readers.file_checker import check_rows
from luthier.data.readers.file_rows import FileRows
from luthier.data.readers.parquet import read_parquet
from tests.rows import read_line

USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a", "weight": 1}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def write(path, table, **options):
    pq.write_table(table if isinstance(table, pa.Table) else pa.Table.from_pylist(table), path, **options)
    return path


def check(path, **limits):
    return check_rows([path.read_bytes()], Limits(**limits), path)


def test_rows_with_nulls_where_a_key_is_absent_are_read(tmp_path):
    calling = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    reported = {"role": "tool", "content": "7", "tool_call_id": "c"}
    rows = [{"messages": [USER, ANSWER]}, {"messages": [USER, calling, reported, ANSWER]}]
    path = write(tmp_path / "rows", rows * 300, row_group_size=7)
    facts = check(path)
    assert (facts.num_rows, facts.format, facts.container) == (600, "chat", "parquet")
    found = list(FileRows(path))
    assert [place.number for place, _ in found] == list(range(1, 601))
    expected = [read_line(discover()["chat"], json.dumps(row).encode()) for row in rows]
    assert [row for _, row in found[:2]] == expected


def test_texts_that_hold_json_are_read_as_such(tmp_path):
    path = write(tmp_path / "rows", [{"messages": json.dumps([USER, ANSWER])}])
    assert check(path).format == "chat"
    path = write(tmp_path / "rows", [{"messages": "[1"}])
    with pytest.raises(
        InvalidFileFormatError, match='Row 1, messages: The text in the column "messages" must'
    ):
        check(path)


def test_faults_are_reported_by_the_row_s_number(tmp_path):
    rows = [{"prompt": "p", "completion": "c"}] * 9 + [{"prompt": "p", "completion": ""}]
    with pytest.raises(InvalidFileFormatError, match=r"^Row 10, completion: "):
        check(write(tmp_path / "rows", rows, row_group_size=4))


@pytest.mark.parametrize(
    ("rows", "reported"),
    [
        ([{"prompt": "p", "completion": "c", "id": 1}], "Row 1, column 3, id: Unknown column"),
        ([{"prompt": "p"}], 'Row 1, completion: The column "completion" is missing'),
        ([{"question": "p"}], "Row 1: No column has the name"),
        ([{"text": b"\xff"}], "Row 1, text: A text of the row is not UTF-8"),
    ],
)
def test_columns_that_no_format_has_are_reported_once(tmp_path, rows, reported):
    with pytest.raises(InvalidFileFormatError) as caught:
        check(write(tmp_path / "rows", rows * 30))
    assert reported in caught.value.message


def test_a_column_of_equal_values_can_not_expand_without_bound(tmp_path):
    path = write(tmp_path / "rows", pa.table({"text": pa.array(["x" * 5000] * 20_000)}))
    assert path.stat().st_size < 100_000
    with pytest.raises(InvalidFileFormatError, match="expands to more than 16777216 bytes"):
        check(path)


def test_a_caller_without_the_whole_file_is_refused(tmp_path):
    content = write(tmp_path / "rows", [{"text": "t"}]).read_bytes()
    with pytest.raises(InvalidFileFormatError, match="Parquet"):
        check_rows([content], Limits())


_MEASURED = """
import sys
from pathlib import Path
import pyarrow.compute, pyarrow.parquet
from luthier.data.readers.base import Limits
from luthier.data.formats.base import Fault
from luthier.data.readers.parquet import read_parquet

def peak_mib():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) // 1024

before = peak_mib()
for path in sys.argv[1:]:
    reported = [item.rule for item in read_parquet(Path(path), Limits()) if isinstance(item, Fault)]
    print(Path(path).name, peak_mib() - before, *reported)
"""


def repeated(value, num):
    return pa.DictionaryArray.from_arrays(pa.array([0] * num, pa.int32()), [value])


def listed(values, num_rows):
    length = len(values) // num_rows
    offsets = [length * row for row in range(num_rows + 1)]
    return pa.table({"messages": pa.ListArray.from_arrays(offsets, values)})


def test_few_bytes_that_stand_for_many_take_no_memory(tmp_path):
    bigs = repeated("x" * 2**20, 512)
    turns = pa.StructArray.from_arrays([repeated("user", 512), bigs], ["role", "content"])
    # More than a dictionary's longest: what follows is written as it is.
    own = pa.array([{"role": "user", "content": "y" * 2**20}, {"role": "user", "content": "z" * 2**20}])
    own = pa.StructArray.from_arrays(
        [own.field(0).dictionary_encode(), own.field(1).dictionary_encode()], ["role", "content"]
    )
    files = {
        "cells": (pa.table({"text": bigs}), "parquet.expansion"),
        "nested": (listed(turns, 512), "parquet.expansion"),
        "mixed": (listed(pa.concat_arrays([turns, own]), 514), "parquet.expansion"),
        "row": (listed(turns, 1), "parquet.limits"),
        "texts": (listed(bigs, 1), "parquet.limits"),
        "values": (listed(pa.nulls(3_000_000, pa.string()), 1), "line.too_long"),
        "more-values": (listed(pa.nulls(5_000_000, pa.string()), 1), "line.too_long"),
        "page": (pa.table({"text": ["x" * (100 * 2**20)]}), "line.too_long"),
    }
    for name, (table, _) in files.items():
        # Without the types of the table, which would have it read as it was made.
        options = {"store_schema": False, "use_dictionary": name != "page"}
        write(tmp_path / name, table, compression="zstd", **options)
        assert (tmp_path / name).stat().st_size < 64 * 1024, name
    command = [sys.executable, "-c", _MEASURED, *(str(tmp_path / name) for name in files)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for line, (name, (_, rule)) in zip(done.stdout.splitlines(), files.items(), strict=True):
        assert line.split()[::2] == [name, rule], line
        assert int(line.split()[1]) < 16, line


def test_the_sizes_that_a_table_of_contents_claims_are_not_believed(tmp_path):
    path = write(
        tmp_path / "rows", pa.table({"text": ["x" * 2**20] * 20}), compression="zstd", use_dictionary=False
    )
    claimed = pq.ParquetFile(path).metadata.row_group(0).total_byte_size
    # Numbers are zigzags of seven bits a byte; the smaller one is as long as what it takes the place of.
    truth = [claimed * 2 >> shift & 127 for shift in (0, 7, 14, 21)]
    claim = [claimed * 2 >> shift & 127 for shift in (0, 7)] + [0, 0]
    old, new = (bytes([a | 128, b | 128, c | 128, d]) for a, b, c, d in (truth, claim))
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new))
    assert pq.ParquetFile(path).metadata.row_group(0).total_byte_size < 2**14
    with pytest.raises(InvalidFileFormatError, match="expands to more than"):
        check(path)


def test_a_column_of_deltas_is_read(tmp_path):
    options = {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}}
    assert check(write(tmp_path / "rows", [{"text": "t"}] * 50, **options)).num_rows == 50


def test_a_long_row_is_reported_and_those_around_it_are_read(tmp_path):
    rows = [{"text": "a"}, {"text": "b" * 5000}, {"text": "c" * 900}, {"text": None}, {"text": "d"}] * 3
    found = list(read_parquet(write(tmp_path / "rows", rows), Limits(max_row_bytes=1000)))
    texts = [json.loads(one.content).get("text") for one in found if isinstance(one, RawRow)]
    assert texts == ["a", "c" * 900, None, "d"] * 3
    assert [one.row for one in found if isinstance(one, Fault)] == [2, 7, 12]
    assert [one.number for one in found if isinstance(one, RawRow)] == [
        1,
        *range(3, 7),
        *range(8, 12),
        13,
        14,
        15,
    ]


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
def test_texts_of_every_kind_are_read_beyond_a_full_dictionary(tmp_path, kind):
    texts = [f"{number} " * 20 for number in range(20_000)]
    path = write(tmp_path / "rows", pa.table({"text": pa.array(texts).cast(kind)}))
    found = [json.loads(one.content)["text"] for one in read_parquet(path, Limits())]
    assert found == texts


def blob():
    return pa.table({"text": pa.array([b"x" * 100], pa.binary(100))})


def twins():
    return pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["text", "text"])


@pytest.mark.parametrize(
    ("make", "cut", "reported"),
    [
        # A column that can't be measured, two of one name, and a file that was cut.
        (blob, 0, "type is none of text"),
        (twins, 0, "can't be read"),
        (lambda: pa.table({"text": ["t"] * 50}), 20, "damaged or was cut"),
    ],
)
def test_a_file_that_can_not_be_read_is_refused(tmp_path, make, cut, reported):
    path = write(tmp_path / "rows", make())
    path.write_bytes(path.read_bytes()[: path.stat().st_size - cut])
    with pytest.raises(InvalidFileFormatError, match=reported):
        check(path)


def test_a_file_that_is_deleted_while_it_is_read_is_read_to_its_end(tmp_path):
    path = write(tmp_path / "rows", [{"text": f"{number}"} for number in range(90)], row_group_size=10)
    rows = read_parquet(path, Limits())
    next(rows)
    path.unlink()
    assert [row.number for row in rows] == list(range(2, 91))


def test_a_damaged_table_of_contents_is_a_fault_and_ends_no_process(tmp_path):
    rows = [{"messages": [USER, ANSWER]}] * 20
    path = write(tmp_path / "rows", rows, store_schema=False, row_group_size=10)
    whole = path.read_bytes()
    begin = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    for place in range(begin, len(whole) - 8, (len(whole) - begin) // 8):
        path.write_bytes(whole[:place] + b"\xff" + whole[place + 1 :])
        found = list(read_parquet(path, Limits()))
        assert len(found) == 20 or any(isinstance(one, Fault) for one in found), place
