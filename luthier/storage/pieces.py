"""Hashes of a file's pieces, which several threads check at once: one alone is slower than memory is read.

A file of up to `_LEAST_BYTES` is one piece and has no such hashes; a larger one has at most `_MOST_PIECES`,
of whole MiB.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

from luthier.core.settings import MIB

# Part of the format of what is published: never to be changed.
_LEAST_BYTES, _MOST_PIECES = 2 * MIB, 64
# Threads that check one file: more than a disk gives work for are of no use.
_MOST_THREADS = 8


def piece_bytes(num_bytes: int) -> int:
    """Return the size of the pieces of a file of so many bytes, of which the last may be shorter."""
    return max(_LEAST_BYTES, -(-num_bytes // (_MOST_PIECES * MIB)) * MIB)


def are_pieces(content: memoryview, pieces: Sequence[str], num_threads: int | None = None) -> bool:
    """Whether bytes are those whose pieces were hashed.

    Args:
        content: all of a file.
        pieces: the sha256 of each piece as 64 hex digits, as its manifest says.
        num_threads: that may check them; as many as there are processors when left out.

    Returns:
        Whether every piece is there and none is left.
    """
    size = piece_bytes(len(content))
    if len(pieces) != -(-len(content) // size):
        return False
    num_threads = min(_MOST_THREADS, num_threads or len(os.sched_getaffinity(0)))
    # Threads share it: each takes the next place that is left.
    places = iter(range(len(pieces)))
    helping = [_helpers().submit(_count, content, size, pieces, places) for _ in range(num_threads - 1)]
    num_right = _count(content, size, pieces, places)
    # Who has not begun by now has nothing to do.
    return num_right + sum(one.result() for one in helping if not one.cancel()) == len(pieces)


def _count(content: memoryview, size: int, pieces: Sequence[str], places: Iterator[int]) -> int:
    """Return how many of the places that this thread took hold the right piece."""
    return sum(
        hashlib.sha256(content[place * size : (place + 1) * size]).hexdigest() == pieces[place]
        for place in places
    )


@cache
def _helpers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_MOST_THREADS, thread_name_prefix="hashing")
