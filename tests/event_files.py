"""A reader of TensorBoard's event files for tests: checks every checksum and decodes what we write."""

import struct
from dataclasses import dataclass, field
from pathlib import Path

from luthier.trackers._event_file import crc32c


@dataclass
class ReadEvent:
    step: int = 0
    wall_time: float = 0.0
    kind: str = ""
    values: dict[str, float] = field(default_factory=dict)


def _unmask(masked: int) -> int:
    rotated = (masked - 0xA282EAD8) & 0xFFFFFFFF
    return ((rotated >> 17) | (rotated << 15)) & 0xFFFFFFFF


def _fields(data: bytes) -> list[tuple[int, bytes | int]]:
    """Return a protocol buffer's fields by number; fixed ones as bytes."""
    found: list[tuple[int, bytes | int]] = []
    place = 0

    def varint() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = data[place]
            place += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while place < len(data):
        key = varint()
        kind = key & 7
        if kind == 0:
            found.append((key >> 3, varint()))
            continue
        length = {1: 8, 5: 4}.get(kind) or varint()
        found.append((key >> 3, data[place : place + length]))
        place += length
    return found


def _decode(data: bytes) -> ReadEvent:
    event = ReadEvent()
    for number, value in _fields(data):
        if number == 1 and isinstance(value, bytes):
            (event.wall_time,) = struct.unpack("<d", value)
        elif number == 2 and isinstance(value, int):
            event.step = value
        elif number == 3:
            assert value == b"brain.Event:2"
            event.kind = "version"
        elif number == 7:
            assert value == b"\x08\x01"
            event.kind = "start"
        elif number == 5 and isinstance(value, bytes):
            event.kind = "scalars"
            for _, scalar in _fields(value):
                assert isinstance(scalar, bytes)
                parts = dict(_fields(scalar))
                tag, number_bytes = parts[1], parts[2]
                assert isinstance(tag, bytes)
                assert isinstance(number_bytes, bytes)
                (event.values[tag.decode()],) = struct.unpack("<f", number_bytes)
    return event


def read_events(path: Path) -> list[ReadEvent]:
    """Return a file's events, in order."""
    data = path.read_bytes()
    events: list[ReadEvent] = []
    place = 0
    while place < len(data):
        header = data[place : place + 8]
        (length,) = struct.unpack("<Q", header)
        (header_crc,) = struct.unpack("<I", data[place + 8 : place + 12])
        content = data[place + 12 : place + 12 + length]
        (content_crc,) = struct.unpack("<I", data[place + 12 + length : place + 16 + length])
        assert _unmask(header_crc) == crc32c(header)
        assert _unmask(content_crc) == crc32c(content)
        events.append(_decode(content))
        place += 16 + length
    return events
