"""TensorBoard's event files, written without TensorBoard: a worker needs none of what it brings.

A file is a row of records (TFRecord): the length of the data as 8 bytes, its masked CRC-32C, the data, its
masked CRC-32C, all little-endian. The data is a protocol buffer `tensorflow.Event`; of its fields these are
used: 1 wall_time (double), 2 step (int64), 3 file_version (string), 5 summary, 7 session_log. A summary holds
values (1) with tag (1) and simple_value (2, float). Source: TensorFlow's record_writer.h, event.proto and
summary.proto.
"""

import struct
from collections.abc import Mapping

_POLYNOMIAL = 0x82F63B78
_MASK_DELTA = 0xA282EAD8
FILE_VERSION = "brain.Event:2"


def _make_table() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        value = byte
        for _ in range(8):
            value = (value >> 1) ^ (_POLYNOMIAL if value & 1 else 0)
        table.append(value)
    return tuple(table)


_TABLE = _make_table()


def crc32c(data: bytes) -> int:
    """Return the CRC-32C (Castagnoli, RFC 3720) of some bytes."""
    value = 0xFFFFFFFF
    for byte in data:
        value = _TABLE[(value ^ byte) & 0xFF] ^ (value >> 8)
    return value ^ 0xFFFFFFFF


def _masked_crc(data: bytes) -> bytes:
    value = crc32c(data)
    rotated = ((value >> 15) | (value << 17)) & 0xFFFFFFFF
    return struct.pack("<I", (rotated + _MASK_DELTA) & 0xFFFFFFFF)


def record(data: bytes) -> bytes:
    """Return one record of a file."""
    length = struct.pack("<Q", len(data))
    return length + _masked_crc(length) + data + _masked_crc(data)


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _event(wall_time: float, step: int, content: bytes) -> bytes:
    return b"\x09" + struct.pack("<d", wall_time) + b"\x10" + _varint(step) + content


def version_event(wall_time: float) -> bytes:
    """Return the event that begins a file."""
    return _event(wall_time, 0, _field(3, FILE_VERSION.encode()))


def start_event(wall_time: float, step: int) -> bytes:
    """Return the event that says from which step work goes on: what earlier files have beyond is void."""
    return _event(wall_time, step, _field(7, b"\x08\x01"))


def scalars_event(wall_time: float, step: int, values: Mapping[str, float]) -> bytes:
    """Return the event that holds numbers of a step, as 32-bit floats."""
    summary = b"".join(
        _field(1, _field(1, tag.encode()) + b"\x15" + struct.pack("<f", value))
        for tag, value in values.items()
    )
    return _event(wall_time, step, _field(5, summary))
