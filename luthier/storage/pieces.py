"""Hashes of a file's pieces, which several threads check at once: one alone is slower than memory is read.

A file of up to `_LEAST_BYTES` is one piece and has no such hashes; a larger one has at most `_MOST_PIECES`,
of whole MiB.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

_MIB = 1 << 20
_LEAST_BYTES = 2 * _MIB
_MOST_PIECES = 64
# Threads that help the one that asks: more than a disk gives work for are of no use.
_MOST_HELPERS = 7


def piece_bytes(num_bytes: int) -> int:
    """Return the size of the pieces of a file of so many bytes, of which the last may be shorter."""
    return max(_LEAST_BYTES, -(-num_bytes // (_MOST_PIECES * _MIB)) * _MIB)


def file_pieces(path: Path) -> list[str] | None:
    """Return the sha256 of each piece of a file as 64 hex digits; None for one that is a single piece."""
    num_bytes = path.stat().st_size
    size = piece_bytes(num_bytes)
    if num_bytes <= size:
        return None
    with path.open("rb") as stream:
        return [hashlib.sha256(piece).hexdigest() for piece in iter(lambda: stream.read(size), b"")]


def are_pieces(content: memoryview, pieces: Sequence[str]) -> bool:
    """Whether bytes are those whose pieces were hashed.

    Args:
        content: all of a file.
        pieces: what `file_pieces` said of it.

    Returns:
        Whether every piece is there and none is left.
    """
    size = piece_bytes(len(content))
    if len(pieces) != -(-len(content) // size):
        return False
    # Threads share it: each takes the next place that is left.
    places = iter(range(len(pieces)))
    helping = [_helpers().submit(_are_right, content, size, pieces, places) for _ in range(_num_helpers())]
    found = [_are_right(content, size, pieces, places)]
    # Who has not begun by now has nothing to do.
    return all([*found, *(one.result() for one in helping if not one.cancel())])


def _are_right(content: memoryview, size: int, pieces: Sequence[str], places: Iterator[int]) -> bool:
    return all(
        hashlib.sha256(content[place * size : (place + 1) * size]).hexdigest() == pieces[place]
        for place in places
    )


def _num_helpers() -> int:
    return min(_MOST_HELPERS, len(os.sched_getaffinity(0)) - 1)


@cache
def _helpers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, _num_helpers()), thread_name_prefix="hashing")
