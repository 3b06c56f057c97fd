"""Frames: pieces of many streams in one, each with its stream's number. Both ends of a channel use them.

A frame is the stream's number and the content's length, 4 bytes each, the most significant first, and the
content. One without content ends its stream.
"""

import struct
from collections.abc import Iterator

_HEAD = struct.Struct(">II")
MAX_NUMBER = 2**32 - 1


def to_frame(number: int, content: bytes) -> bytes:
    """Return a frame of the stream with a number."""
    return _HEAD.pack(number, len(content)) + content


class FrameReader:
    """Frames from bytes that come in pieces of any size."""

    def __init__(self) -> None:
        self._rest = b""

    def read(self, piece: bytes) -> Iterator[tuple[int, bytes]]:
        """Take the next bytes.

        Args:
            piece: what came.

        Yields:
            The number and the content of each frame that is whole.
        """
        content = self._rest + piece if self._rest else piece
        start, size = 0, len(content)
        while start + _HEAD.size <= size:
            number, length = _HEAD.unpack_from(content, start)
            end = start + _HEAD.size + length
            if end > size:
                break
            yield number, content[start + _HEAD.size : end]
            start = end
        self._rest = content[start:]
