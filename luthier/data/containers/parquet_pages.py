"""What the pages of a Parquet file hold by their own headers, told before any of them is unpacked.

The table of contents at a file's end is what its writer claims; a page's header is what the reader's library
makes room for. The headers are Thrift's compact protocol.
"""

from typing import Any, BinaryIO, NamedTuple

_HEADER_BYTES = 8 * 1024
_MAX_HEADER_BYTES = 16 * 1024 * 1024
_MAX_DEPTH = 8
# Field numbers of PageHeader and of the headers within it.
_UNPACKED, _PACKED, _DATA, _DICTIONARY, _DATA_V2 = 2, 3, 5, 7, 8
_NUM_VALUES = 1
_ENCODING = {_DATA: 2, _DATA_V2: 4}
# Each value names how much of the one before it repeats: pages of it expand without bound.
_DELTA_BYTE_ARRAY = 7
_BY_DICTIONARY = (2, 8)
# Writers begin no larger one; the texts of one beyond it are not looked at.
_MAX_DICTIONARY_BYTES = 4 * 1024 * 1024


class ColumnPages(NamedTuple):
    """What a column's pages in a row group add up to.

    `num_bytes` are unpacked; `num_by_dictionary` of the values are numbers of a dictionary, whose longest
    text has at most `longest_bytes`. `is_mixed` says that other pages have their values in themselves.
    """

    num_bytes: int = 0
    num_values: int = 0
    num_by_dictionary: int = 0
    longest_bytes: int = 0
    is_mixed: bool = False
    is_delta: bool = False


def measure_column(source: BinaryIO, column: Any, file_bytes: int) -> ColumnPages:
    """Add up the pages of a column by their headers.

    Args:
        source: the file.
        column: its metadata in a row group, of pyarrow; only its place is believed.
        file_bytes: the file's size.

    Returns:
        The sums.

    Raises:
        ValueError: when a page is not where it should be, or its header can't be read.
    """
    position = column.data_page_offset
    if column.has_dictionary_page and 0 < column.dictionary_page_offset < position:
        position = column.dictionary_page_offset
    end = position + column.total_compressed_size
    if position < 0 or column.total_compressed_size < 0 or end > file_bytes:
        raise ValueError("a column lies beyond the file")
    found = ColumnPages()
    while position < end:
        header, size = _read_header(source, position, end)
        found = _add_page(found, header, source, position + size, column)
        position += size + header[_PACKED]
    return found


def _add_page(
    found: ColumnPages, header: dict[int, Any], source: BinaryIO, position: int, column: Any
) -> ColumnPages:
    num_bytes = header[_UNPACKED]
    found = found._replace(num_bytes=found.num_bytes + num_bytes)
    if _DICTIONARY in header:
        if header[_DICTIONARY].get(_NUM_VALUES, 0) > num_bytes:
            raise ValueError("a dictionary has more values than bytes")
        longest = num_bytes
        if max(num_bytes, header[_PACKED]) <= _MAX_DICTIONARY_BYTES:
            source.seek(position)
            longest = _find_longest(source.read(header[_PACKED]), num_bytes, column.compression)
        return found._replace(longest_bytes=max(found.longest_bytes, longest))
    for kind, encoding in _ENCODING.items():
        inner = header.get(kind)
        if inner is None:
            continue
        num_values, written = inner.get(_NUM_VALUES, 0), inner.get(encoding)
        is_by_dictionary = written in _BY_DICTIONARY
        return found._replace(
            num_values=found.num_values + num_values,
            num_by_dictionary=found.num_by_dictionary + (num_values if is_by_dictionary else 0),
            is_mixed=found.is_mixed or not is_by_dictionary,
            is_delta=found.is_delta or written == _DELTA_BYTE_ARRAY,
        )
    return found


def _find_longest(packed: bytes, num_bytes: int, compression: str) -> int:
    """Return the length of a dictionary's longest text; its whole size where that can't be told."""
    import pyarrow as pa

    try:
        content = packed
        if compression != "UNCOMPRESSED":
            content = (
                pa.Codec(compression.lower()).decompress(packed, decompressed_size=num_bytes).to_pybytes()
            )
        position = longest = 0
        while position < len(content):
            length = int.from_bytes(content[position : position + 4], "little")
            longest = max(longest, length)
            position += 4 + length
    except (pa.ArrowException, OSError, ValueError):
        return num_bytes
    return longest if position == len(content) else num_bytes


def _read_header(source: BinaryIO, position: int, end: int) -> tuple[dict[int, Any], int]:
    for limit in (_HEADER_BYTES, _MAX_HEADER_BYTES):
        source.seek(position)
        reader = _Compact(source.read(min(limit, end - position)))
        try:
            header = reader.read_struct(0)
        except IndexError:
            continue
        if header.get(_UNPACKED, -1) < 0 or header.get(_PACKED, -1) < 0:
            raise ValueError("a page has no size")
        return header, reader.position
    raise ValueError("a page's header has no end")


class _Compact:
    """Reads a struct of Thrift's compact protocol: numbers and structs are kept, all else is passed over.

    Beyond the end of what there is it raises IndexError.
    """

    def __init__(self, content: bytes) -> None:
        self._content = content
        self.position = 0

    def read_struct(self, depth: int) -> dict[int, Any]:
        if depth > _MAX_DEPTH:
            raise ValueError("too deep")
        fields: dict[int, Any] = {}
        number = 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._signed()
            kind = head & 15
            # A member that is a truth is its own kind.
            fields[number] = kind == 1 if kind in (1, 2) else self._value(kind, depth)
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        if kind in (1, 2, 3):
            return self._byte()
        if kind in (4, 5, 6):
            return self._signed()
        if kind == 7:
            return self._skip(8)
        if kind == 8:
            return self._skip(self._unsigned())
        if kind in (9, 10):
            head = self._byte()
            size = self._unsigned() if head >> 4 == 15 else head >> 4
            for _ in range(size):
                self._value(head & 15, depth + 1)
            return None
        if kind == 12:
            return self.read_struct(depth + 1)
        raise ValueError("not a page's header")

    def _byte(self) -> int:
        self.position += 1
        return self._content[self.position - 1]

    def _skip(self, num_bytes: int) -> None:
        self.position += num_bytes
        if self.position > len(self._content):
            raise IndexError

    def _unsigned(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError("a number without an end")

    def _signed(self) -> int:
        value = self._unsigned()
        return (value >> 1) ^ -(value & 1)
