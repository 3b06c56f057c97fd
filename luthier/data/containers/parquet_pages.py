"""What the pages of a Parquet file hold by their own headers, told before any of them is unpacked.

The table of contents at a file's end is what its writer claims; a page's header is what the reader's library
makes room for. Both are Thrift's compact protocol. Of the table only places are believed, and it is read here
since pyarrow ends the process when it is asked for a column whose entry is damaged.
"""

from typing import Any, BinaryIO, NamedTuple

_HEADER_BYTES = 8 * 1024
_MAX_HEADER_BYTES = 16 * 1024 * 1024
_MAX_DEPTH = 20
_MAX_FOOTER_BYTES = 16 * 1024 * 1024
# Field numbers of PageHeader and of the headers within it.
_UNPACKED, _PACKED, _DATA, _DICTIONARY, _DATA_V2 = 2, 3, 5, 7, 8
_NUM_VALUES = 1
_ENCODING = {_DATA: 2, _DATA_V2: 4}
# Each value names how much of the one before it repeats: pages of it expand without bound.
_DELTA_BYTE_ARRAY = 7
_CODECS = {1: "snappy", 2: "gzip", 4: "brotli", 6: "zstd", 7: "lz4_raw"}
_BY_DICTIONARY = (2, 8)
# Writers begin no larger one; the texts of one beyond it are not looked at.
_MAX_DICTIONARY_BYTES = 4 * 1024 * 1024


class ColumnPages(NamedTuple):
    """What a column's pages in a row group add up to.

    `num_bytes` are unpacked; `num_by_dictionary` of the values are numbers of a dictionary, whose longest
    text has at most `longest_bytes`; `dictionary` is the place of its bytes and their number as they lie
    there. `is_mixed` says that other pages have their values in themselves.
    """

    num_bytes: int = 0
    num_values: int = 0
    num_by_dictionary: int = 0
    longest_bytes: int = 0
    dictionary: tuple[int, int] = (0, 0)
    is_mixed: bool = False
    is_delta: bool = False


class ColumnPlace(NamedTuple):
    """Where a column's pages of a row group begin and end in the file, and the number of their codec."""

    begin: int
    end: int
    codec: int


def read_places(source: BinaryIO, file_bytes: int) -> list[list[ColumnPlace]]:
    """Read from the table of contents where the columns of each row group lie.

    Returns:
        The places, for each row group in the order of its columns.

    Raises:
        ValueError: when the table is damaged, or a column lies beyond the file.
    """
    source.seek(file_bytes - 8)
    length = int.from_bytes(source.read(4), "little")
    if not 0 < length <= min(_MAX_FOOTER_BYTES, file_bytes - 8):
        raise ValueError("a table of contents without sense")
    source.seek(file_bytes - 8 - length)
    try:
        table = _Compact(source.read(length)).read_struct(0)
        return [[_find_place(one[3], file_bytes) for one in group[1]] for group in table.get(4, [])]
    except (IndexError, KeyError, TypeError) as error:
        raise ValueError("a damaged table of contents") from error


def _find_place(entry: Any, file_bytes: int) -> ColumnPlace:
    begin, dictionary = _number(entry, 9), entry.get(11, 0)
    if 0 < dictionary < begin:
        begin = dictionary
    end = begin + _number(entry, 7)
    if end > file_bytes:
        raise ValueError("a column lies beyond the file")
    return ColumnPlace(begin, end, _number(entry, 4))


def measure_column(source: BinaryIO, place: ColumnPlace) -> ColumnPages:
    """Add up the pages of a column by their headers.

    Args:
        place: where its pages are.

    Raises:
        ValueError: when a page is not where it should be, or its header can't be read.
    """
    position, end = place.begin, place.end
    found = ColumnPages()
    while position < end:
        header, size = _read_header(source, position, end)
        found = _add_page(found, header, position + size)
        position += size + header[_PACKED]
    return found


def _add_page(found: ColumnPages, header: dict[int, Any], position: int) -> ColumnPages:
    num_bytes = header[_UNPACKED]
    found = found._replace(num_bytes=found.num_bytes + num_bytes)
    if _DICTIONARY in header:
        if found.longest_bytes or _number(header[_DICTIONARY], _NUM_VALUES) > num_bytes:
            raise ValueError("a second dictionary, or one with more values than bytes")
        return found._replace(longest_bytes=num_bytes, dictionary=(position, header[_PACKED]))
    for kind, encoding in _ENCODING.items():
        inner = header.get(kind)
        if inner is None:
            continue
        num_values, written = _number(inner, _NUM_VALUES), _number(inner, encoding)
        is_by_dictionary = written in _BY_DICTIONARY
        return found._replace(
            num_values=found.num_values + num_values,
            num_by_dictionary=found.num_by_dictionary + (num_values if is_by_dictionary else 0),
            is_mixed=found.is_mixed or not is_by_dictionary,
            is_delta=found.is_delta or written == _DELTA_BYTE_ARRAY,
        )
    return found


def _number(fields: Any, key: int) -> int:
    value = fields.get(key) if isinstance(fields, dict) else None
    if type(value) is not int or value < 0:
        raise ValueError("a page's header lacks a number")
    return value


def find_longest(source: BinaryIO, pages: ColumnPages, codec: int) -> int:
    """Look for the longest text of a column's dictionary.

    Args:
        codec: of the column, as Parquet numbers them.

    Returns:
        Its length, or more where that can't be told.
    """
    import pyarrow as pa

    position, num_packed = pages.dictionary
    num_bytes = pages.longest_bytes
    if max(num_bytes, num_packed) > _MAX_DICTIONARY_BYTES:
        return num_bytes
    source.seek(position)
    content = packed = source.read(num_packed)
    try:
        if codec != 0:
            content = pa.Codec(_CODECS[codec]).decompress(packed, decompressed_size=num_bytes).to_pybytes()
        position = longest = 0
        while position < len(content):
            length = int.from_bytes(content[position : position + 4], "little")
            longest = max(longest, length)
            position += 4 + length
    except (pa.ArrowException, OSError, ValueError, KeyError):
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
        _number(header, _UNPACKED)
        _number(header, _PACKED)
        return header, reader.position
    raise ValueError("a page's header has no end")


class _Compact:
    """Reads a struct of Thrift's compact protocol: numbers, structs and lists are kept, texts passed over.

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
            return [self._value(head & 15, depth + 1) for _ in range(size)]
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
