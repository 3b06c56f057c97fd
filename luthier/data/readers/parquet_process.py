"""The process that reads a Parquet file on stdin: `python -m luthier.data.readers.parquet_process LIMITS`.

Writes a line a row, a JSON object; for a row that breaks a rule a JSON list, the fault's members.
"""

import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import types

from luthier.data.formats.base import Fault, RowFormat, escape_text
from luthier.data.readers.base import Limits, too_long
from luthier.data.readers.detect_format import find_format
from luthier.data.readers.parquet import MAX_MEMORY_BYTES, MAX_PROCESSOR_SECONDS, limits_fault

_MAX_BATCH_ROWS = 64
# What the rows of a batch are meant to be together, by what the writer says of their group.
_BATCH_BYTES = 16 * 1024 * 1024
_READ_BYTES = 1024 * 1024
# A file may always expand to this: columns of equal values take next to nothing.
_FREE_BYTES = 16 * 1024 * 1024


def limit_process() -> None:
    """Bound this process's memory, beyond what it has now, and its processor time."""
    status = Path("/proc/self/statm")
    if status.exists():
        num_bytes = int(status.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (num_bytes + MAX_MEMORY_BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (MAX_PROCESSOR_SECONDS,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def read_rows(source: Any, limits: Limits) -> Iterator[bytes | Fault]:
    """Yield each row of an open file as a JSON object, or its fault."""
    try:
        with pq.ParquetFile(source, buffer_size=_READ_BYTES) as file:
            names = file.schema_arrow.names
            if len(set(names)) != len(names):
                raise ValueError("two columns of one name")
            found = find_format(names)
            faults = [*_check_columns(names, found)]
            faults += [_type_fault(one.name) for one in file.schema_arrow if not _is_readable(one.type)]
            yield from faults
            if found is not None and not faults:
                yield from _read(file, found, limits, source.size())
    except MemoryError:
        yield limits_fault(1)
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        advice = f"The Parquet file can't be read ({type(error).__name__}): it is damaged or was cut."
        yield Fault(1, None, None, "parquet.damaged", advice, 1)


def _check_columns(names: list[str], found: RowFormat | None) -> Iterator[Fault]:
    if found is None:
        advice = "No column has the name of a key of a row, such as messages, prompt or text."
        yield Fault(1, None, None, "parquet.columns", advice, 1)
        return
    for place, name in enumerate(names, start=1):
        if name not in found.keys:
            known = ", ".join(sorted(found.keys))
            advice = f"Unknown column; rows of the format {found.name} have {known}. Drop it."
            yield Fault(1, place, escape_text(name), "parquet.unknown_column", advice, 1)
    for name in sorted(found.signature - set(names)):
        yield Fault(1, None, name, "parquet.missing_column", f'The column "{name}" is missing.', 1)


def _type_fault(name: str) -> Fault:
    advice = "A column's type is none of text, number, list or struct. Write it as text."
    return Fault(1, None, escape_text(name), "parquet.type", advice, 1)


def _is_readable(kind: pa.DataType) -> bool:
    if types.is_struct(kind):
        return all(_is_readable(kind.field(index).type) for index in range(kind.num_fields))
    if types.is_list(kind) or types.is_large_list(kind):
        return _is_readable(kind.value_type)
    if types.is_dictionary(kind):
        return _is_readable(kind.value_type)
    is_text = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    is_bytes = types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)
    is_number = types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)
    return bool(is_text or is_bytes or is_number or types.is_null(kind))


def _read(file: pq.ParquetFile, found: RowFormat, limits: Limits, size_bytes: int) -> Iterator[bytes | Fault]:
    allowed = min(limits.max_expanded_bytes, max(_FREE_BYTES, size_bytes * limits.max_expansion_ratio))
    number = num_bytes = 0
    for group in range(file.metadata.num_row_groups):
        claimed = file.metadata.row_group(group)
        num_rows = _BATCH_BYTES * claimed.num_rows // max(1, claimed.total_byte_size)
        size = max(1, min(_MAX_BATCH_ROWS, num_rows))
        for batch in file.iter_batches(batch_size=size, row_groups=[group], use_threads=False):
            for values in batch.to_pylist():
                number += 1
                row = _to_row(values, found.json_keys, number, limits.max_row_bytes)
                num_bytes += 0 if isinstance(row, Fault) else len(row)
                yield row
                if num_bytes > allowed:
                    yield _expansion_fault(number, allowed)
                    return


def _expansion_fault(number: int, allowed: float) -> Fault:
    advice = (
        f"The file expands to more than {int(allowed)} bytes; split it, or ask the operator "
        "to raise LUTHIER_MAX_EXPANDED_BYTES or LUTHIER_MAX_EXPANSION_RATIO."
    )
    return Fault(number, None, None, "parquet.expansion", advice, number)


def _to_row(values: dict[str, Any], json_keys: frozenset[str], number: int, max_bytes: int) -> bytes | Fault:
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
                advice = f'The text in the column "{key}" must be JSON.'
                return Fault(number, None, key, "parquet.json", advice, number)
            # Without its line breaks: a row is a line.
            value = msgspec.Raw(msgspec.json.format(value.encode(), indent=-1))
        fields[key] = value
    content = msgspec.json.encode(fields)
    return content if len(content) <= max_bytes else too_long(number, max_bytes, number)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    if isinstance(value, bytes):
        return value.decode("utf-8")
    return value


def main() -> None:
    limits = msgspec.json.decode(sys.argv[1], type=Limits)
    limit_process()
    pa.set_cpu_count(1)
    with pa.OSFile("/dev/stdin") as source:
        for row in read_rows(source, limits):
            line = row if isinstance(row, bytes) else msgspec.json.encode(_members(row))
            sys.stdout.buffer.write(line + b"\n")
    sys.stdout.buffer.flush()


def _members(fault: Fault) -> tuple[object, ...]:
    return fault.line, fault.column, fault.field, fault.rule, fault.message, fault.row


if __name__ == "__main__":
    main()
