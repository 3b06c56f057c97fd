"""TensorBoard's event files, read back for tests."""

import struct
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event


def read_events(path: Path) -> list[Event]:
    """Return a file's events, in order; each is its length, a checksum, its bytes, and a checksum."""
    data = path.read_bytes()
    events: list[Event] = []
    place = 0
    while place < len(data):
        (length,) = struct.unpack_from("<Q", data, place)
        events.append(Event.FromString(data[place + 12 : place + 12 + length]))
        place += 16 + length
    return events


def scalars(event: Event) -> dict[str, float]:
    """Return the numbers of an event by their names."""
    return {value.tag: value.simple_value for value in event.summary.value}
