"""Parquet, read from a whole file: its table of contents is at its end. Memory is that of a row group's
pages and of a few hundred rows.

A table's null counts as an absent key, since its columns can't leave one out.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from luthier.data.containers.base import MIB, Limits, RawRow, too_long
from luthier.data.formats.base import Fault, RowFormat, escape_text
from luthier.data.recognise import find_format

MAGIC = b"PAR1"
_BATCH_ROWS = 256
# What a writer's usual settings stay far below; a group beyond it would not fit a small machine.
_MAX_GROUP_BYTES = 1024 * MIB
# So much a file may expand to whatever its size: columns of equal values take next to nothing.
_FREE_BYTES = 16 * MIB


def read_parquet(path: Path, limits: Limits) -> Iterator[RawRow | Fault]:
    """Yield the rows of a Parquet file.

    Args:
        path: the file.
        limits: the longest row, and how much the file may expand to.

    Yields:
        The rows, numbered from 1; a fault where the file, a column or a row breaks a rule.
    """
    # Large: only who reads such a file loads it.
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            found = find_format(file.schema_arrow.names)
            faults = list(_check_columns(file.schema_arrow.names, found))
            yield from faults
            if not faults:
                yield from _read(file, found, limits, path.stat().st_size)
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        told = f"The Parquet file can't be read ({type(error).__name__}): it is damaged or was cut."
        yield Fault(1, None, None, "parquet.damaged", told, 1)


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


def _read(file: Any, found: RowFormat | None, limits: Limits, size_bytes: int) -> Iterator[RawRow | Fault]:
    json_keys: frozenset[str] = frozenset() if found is None else found.json_keys
    number = num_bytes = 0
    allowed = min(limits.max_expanded_bytes, max(_FREE_BYTES, size_bytes * limits.max_expansion_ratio))
    for group in range(file.num_row_groups):
        if file.metadata.row_group(group).total_byte_size > _MAX_GROUP_BYTES:
            told = f"A row group is larger than {_MAX_GROUP_BYTES} bytes; write smaller ones."
            yield Fault(number + 1, None, None, "parquet.row_group", told, number + 1)
            return
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, row_groups=[group]):
            for values in batch.to_pylist():
                number += 1
                row = _to_row(values, json_keys, number, limits.max_row_bytes)
                if isinstance(row, RawRow):
                    num_bytes += len(row.content)
                yield row
                if num_bytes > allowed:
                    told = (
                        f"The file expands to more than {int(allowed)} bytes; split it, or ask the operator "
                        "to raise LUTHIER_MAX_EXPANDED_BYTES or LUTHIER_MAX_EXPANSION_RATIO."
                    )
                    yield Fault(number, None, None, "parquet.expansion", told, number)
                    return


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
