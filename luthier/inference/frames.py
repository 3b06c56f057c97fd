"""Frames: pieces of many streams in one, each with its stream's number. Both ends of a channel use them.

A frame is the stream's number and the content's length, 4 bytes each, the most significant first, and the
content. One without content ends its stream. Streams are numbered from 1; 0 is nobody's, and says that the
channel lives.
"""

import struct
from collections.abc import Iterator

_HEAD = struct.Struct(">II")
MAX_NUMBER = 2**32 - 1
SIGN_OF_LIFE = _HEAD.pack(0, 0)


def to_frame(number: int, content: bytes) -> bytes:
    """Return a frame of the stream with a number."""
    return _HEAD.pack(number, len(content)) + content


class FrameReader:
    """Frames from bytes that come in pieces of any size."""

    def __init__(self) -> None:
        # What came of a frame that is not whole, and how long it is as far as that is known.
        self._held = bytearray()
        self._size = _HEAD.size

    def read(self, piece: bytes) -> Iterator[tuple[int, bytes]]:
        """Take the next bytes.

        Yields:
            The number and the content of each frame that is whole.
        """
        if self._held:
            self._held += piece
            if len(self._held) < self._size:
                return
            piece = bytes(self._held)
        start = 0
        while start + _HEAD.size <= len(piece):
            number, length = _HEAD.unpack_from(piece, start)
            end = start + _HEAD.size + length
            if end > len(piece):
                break
            yield number, piece[start + _HEAD.size : end]
            start = end
        self._held = bytearray(piece[start:])
        self._size = end - start if start + _HEAD.size <= len(piece) else _HEAD.size
