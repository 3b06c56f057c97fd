"""Parquet, read from a whole file: its table of contents is at its end. Memory is that of a row group's
pages and of a few rows, whatever that table claims.

A few bytes can stand for any number of long texts: numbers of a dictionary. Where that could matter texts
stay such numbers, and rows become Python's objects only once it is known how long they are.

A table's null counts as an absent key, since its columns can't leave one out.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from luthier.data.containers.base import MIB, Limits, RawRow, too_long
from luthier.data.containers.parquet_pages import (
    ColumnPages,
    ColumnPlace,
    find_longest,
    measure_column,
    read_places,
)
from luthier.data.formats.base import Fault, RowFormat, escape_text
from luthier.data.recognise import find_format

MAGIC = b"PAR1"
_MAX_BATCH_ROWS = 1024
# What the rows of a batch are meant to be together, in pages; how many fit is told by a group's average.
_BATCH_BYTES = 64 * MIB
_BATCH_VALUES = 256 * 1024
_MAX_MIXED_BYTES = 128 * MIB
# What a writer's usual settings stay far below; a group beyond it would not fit a small machine.
_MAX_GROUP_BYTES = 1024 * MIB
_MAX_GROUP_VALUES = 16 * 1024 * 1024
_MAX_BATCH_VALUES = 4 * 1024 * 1024
# Even an empty value is an object of some 100 bytes in Python.
_MAX_ROW_VALUES = 1024 * 1024
# The texts that are made into Python's objects at a time, if one row is not longer.
_SLICE_BYTES = 16 * MIB
# So much a file may expand to whatever its size: columns of equal values take next to nothing.
_FREE_BYTES = 16 * MIB
_MAX_FIXED_BYTES = 64


def read_parquet(path: Path, limits: Limits) -> Iterator[RawRow | Fault]:
    """Yield the rows of a Parquet file.

    Args:
        limits: the longest row, and how much the file may expand to.

    Yields:
        The rows, numbered from 1; a fault where the file, a column or a row breaks a rule.
    """
    # Large: only who reads such a file loads it.
    import pyarrow as pa

    try:
        # One handle: the file may be deleted while it is read.
        with pa.OSFile(str(path)) as source:
            yield from _read_file(source, limits)
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        told = f"The Parquet file can't be read ({type(error).__name__}): it is damaged or was cut."
        yield Fault(1, None, None, "parquet.damaged", told, 1)


def _read_file(source: Any, limits: Limits) -> Iterator[RawRow | Fault]:
    import pyarrow.parquet as pq

    from luthier.data.containers.parquet_cells import is_readable

    with pq.ParquetFile(source) as file:
        columns = [file.schema.column(index) for index in range(len(file.schema))]
        names = file.schema_arrow.names
    paths = [column.path for column in columns]
    if len(set(paths)) != len(paths):
        raise ValueError("two columns of one name")
    found = find_format(names)
    faults = list(_check_columns(names, found))
    if any(column.length > _MAX_FIXED_BYTES for column in columns):
        faults.append(_type_fault(None))
    texts = [column.path for column in columns if column.physical_type == "BYTE_ARRAY"]
    with pq.ParquetFile(source, read_dictionary=texts) as file:
        faults += [_type_fault(one.name) for one in file.schema_arrow if not is_readable(one.type)]
        yield from faults
        if not faults:
            yield from _read(file, source, paths, texts, found, limits)


def _check_columns(names: list[str], found: RowFormat | None) -> Iterator[Fault]:
    if found is None:
        told = "No column has the name of a key of a row, such as messages, prompt or text."
        yield Fault(1, None, None, "parquet.columns", told, 1)
        return
    for place, name in enumerate(names, start=1):
        if name not in found.keys:
            known = ", ".join(sorted(found.keys))
            told = f"Unknown column; rows of the format {found.name} have {known}. Drop it."
            yield Fault(1, place, escape_text(name), "parquet.unknown_column", told, 1)
    for name in sorted(found.signature - set(names)):
        yield Fault(1, None, name, "parquet.missing_column", f'The column "{name}" is missing.', 1)


def _type_fault(name: str | None) -> Fault:
    told = "A column's type is none of text, number, list or struct. Write it as text."
    return Fault(1, None, None if name is None else escape_text(name), "parquet.type", told, 1)


def _read(
    file: Any, source: Any, paths: list[str], texts: list[str], found: RowFormat | None, limits: Limits
) -> Iterator[RawRow | Fault]:
    json_keys: frozenset[str] = frozenset() if found is None else found.json_keys
    number = num_bytes = num_unpacked = 0
    size_bytes = source.size()
    allowed = min(limits.max_expanded_bytes, max(_FREE_BYTES, size_bytes * limits.max_expansion_ratio))
    for group, columns in enumerate(read_places(source, size_bytes)):
        places = dict(zip(paths, columns, strict=True))
        pages = {name: measure_column(source, place) for name, place in places.items()}
        num_unpacked += sum(one.num_bytes for one in pages.values())
        fault = _judge_pages(pages, number + 1)
        if fault is None and num_unpacked > allowed:
            fault = _expansion_fault(number + 1, allowed)
        if fault is None:
            pages = _look_closer(source, pages, places)
            numbered = _find_numbered(pages, texts)
            if sum(pages[name].num_bytes for name in numbered if pages[name].is_mixed) > _MAX_MIXED_BYTES:
                fault = _group_fault(number + 1)
        if fault is not None:
            yield fault
            return
        num_rows = _count_batch_rows(pages, file.metadata.row_group(group).num_rows)
        for values in _read_group(
            _iter_batches(source, file, group, num_rows, numbered), number, limits.max_row_bytes
        ):
            number += 1
            if isinstance(values, Fault):
                yield values
                continue
            row = _to_row(values, json_keys, number, limits.max_row_bytes)
            if isinstance(row, RawRow):
                num_bytes += len(row.content)
            yield row
            if num_bytes > allowed:
                yield _expansion_fault(number, allowed)
                return


def _look_closer(
    source: Any, pages: dict[str, ColumnPages], places: dict[str, ColumnPlace]
) -> dict[str, ColumnPages]:
    """Return the pages with the length of the longest text where a dictionary's size says too little."""
    found = dict(pages)
    for name, one in pages.items():
        if one.is_mixed and one.num_by_dictionary * one.longest_bytes > _SLICE_BYTES:
            found[name] = one._replace(longest_bytes=find_longest(source, one, places[name].codec))
    return found


def _find_numbered(pages: dict[str, ColumnPages], texts: list[str]) -> list[str]:
    """Return the columns whose texts could take too much room if they were read in full.

    The reader keeps all texts of a mixed column that it reads as numbers, so that is done at need only.
    """
    numbered, num_bytes = [], 0
    for name in texts:
        num_more = pages[name].num_by_dictionary * pages[name].longest_bytes
        if num_bytes + num_more > (_MAX_MIXED_BYTES if pages[name].is_mixed else _SLICE_BYTES):
            numbered.append(name)
        else:
            num_bytes += num_more
    return numbered


def _iter_batches(source: Any, file: Any, group: int, num_rows: int, numbered: list[str]) -> Iterator[Any]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(source, read_dictionary=numbered, metadata=file.metadata) as opened:
        yield from opened.iter_batches(batch_size=num_rows, row_groups=[group])


def _judge_pages(pages: dict[str, ColumnPages], number: int) -> Fault | None:
    if any(one.is_delta for one in pages.values()):
        told = "A column's encoding is DELTA_BYTE_ARRAY; write it as PLAIN or with a dictionary."
        return Fault(number, None, None, "parquet.encoding", told, number)
    num_bytes = sum(one.num_bytes for one in pages.values())
    most_values = max(one.num_values for one in pages.values())
    is_too_large = num_bytes > _MAX_GROUP_BYTES or most_values > _MAX_GROUP_VALUES
    return _group_fault(number) if is_too_large else None


def _group_fault(number: int) -> Fault:
    told = f"A row group is too large: more than {_MAX_GROUP_BYTES} bytes, or values; write smaller ones."
    return Fault(number, None, None, "parquet.row_group", told, number)


def _expansion_fault(number: int, allowed: float) -> Fault:
    told = (
        f"The file expands to more than {int(allowed)} bytes; split it, or ask the operator "
        "to raise LUTHIER_MAX_EXPANDED_BYTES or LUTHIER_MAX_EXPANSION_RATIO."
    )
    return Fault(number, None, None, "parquet.expansion", told, number)


def _count_batch_rows(pages: dict[str, ColumnPages], num_rows: int) -> int:
    by_bytes = _BATCH_BYTES * num_rows // max(1, sum(one.num_bytes for one in pages.values()))
    by_values = _BATCH_VALUES * num_rows // max(1, sum(one.num_values for one in pages.values()))
    return max(1, min(_MAX_BATCH_ROWS, by_bytes, by_values))


def _read_group(batches: Iterator[Any], number: int, max_bytes: int) -> Iterator[dict[str, Any] | Fault]:
    """Yield the rows after a number; a fault in the place of one that is too long to be made."""
    from luthier.data.containers.parquet_cells import count_values, measure_rows

    for batch in batches:
        if sum(count_values(column) for column in batch.columns) > _MAX_BATCH_VALUES:
            yield _too_many_values(number + 1)
            return
        sizes = np.sum([measure_rows(column) for column in batch.columns], axis=0)
        start = 0
        while start < batch.num_rows:
            num_bytes, num_values = (int(size) for size in sizes[:, start])
            if num_bytes > max_bytes or num_values > _MAX_ROW_VALUES:
                row = number + start + 1
                yield too_long(row, max_bytes, row) if num_bytes > max_bytes else _too_many_values(row)
                start += 1
                continue
            end = start + _count_fitting(sizes[:, start:], min(_SLICE_BYTES, max_bytes))
            yield from batch.slice(start, end - start).to_pylist()
            start = end
        number += batch.num_rows


def _count_fitting(sizes: npt.NDArray[np.int64], max_bytes: int) -> int:
    """Return how many rows are made at a time, at least the first."""
    limits = np.array([[max_bytes], [_MAX_ROW_VALUES]])
    return max(1, int((sizes.cumsum(axis=1) <= limits).all(axis=0).sum()))


def _too_many_values(number: int) -> Fault:
    told = f"The row, or one after it, has more than {_MAX_ROW_VALUES} values; split it."
    return Fault(number, None, None, "parquet.values", told, number)


def _to_row(values: dict[str, Any], json_keys: frozenset[str], number: int, max_bytes: int) -> RawRow | Fault:
    fields: dict[str, Any] = {}
    for key, given in values.items():
        try:
            value = _without_nulls(given)
        except UnicodeDecodeError:
            return Fault(number, None, key, "text.utf8", "A text of the row is not UTF-8.", number)
        if value is None:
            continue
        if key in json_keys and isinstance(value, str):
            try:
                msgspec.json.decode(value)
            except (msgspec.MsgspecError, RecursionError):
                told = f'The text in the column "{key}" must be JSON.'
                return Fault(number, None, key, "parquet.json", told, number)
            value = msgspec.Raw(value.encode())
        fields[key] = value
    content = msgspec.json.encode(fields)
    if len(content) > max_bytes:
        return too_long(number, max_bytes, number)
    return RawRow(number, content, 0, is_numbered_by_row=True)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    if isinstance(value, bytes):
        return value.decode("utf-8")
    return value
