"""Gzip (RFC 1952), expanded as it arrives with the memory of one block, within limits."""

import itertools
import zlib
from collections.abc import Iterable, Iterator

from luthier.core.errors import InvalidFileFormatError
from luthier.data.readers.base import MIB, Limits

MAGIC = b"\x1f\x8b"
_BLOCK_BYTES = 256 * 1024
_SLICE_BYTES = 16 * 1024
# Always allowed, for short files of equal rows.
_FREE_BYTES = 16 * MIB
_WITH_GZIP_HEADER = 31


def gunzip(chunks: Iterable[bytes], limits: Limits) -> Iterator[bytes]:
    """Yield what a file of one or more members expands to, in blocks of at most 256 KiB.

    Raises:
        InvalidFileFormatError: when the file is damaged, was cut, or expands beyond the limits.
    """
    inflate = zlib.decompressobj(wbits=_WITH_GZIP_HEADER)
    num_in = num_out = 0
    # What follows a member is copied at its end, so what is given to zlib is small.
    for part in itertools.chain.from_iterable(map(_slices, chunks)):
        num_in += len(part)
        waiting = part
        while True:
            if inflate.eof:
                # Tools pad with zeros; a new member begins with a header of its own.
                waiting = waiting.lstrip(b"\0")
                if not waiting:
                    break
                inflate = zlib.decompressobj(wbits=_WITH_GZIP_HEADER)
            try:
                block = inflate.decompress(waiting, _BLOCK_BYTES)
            except zlib.error as error:
                raise InvalidFileFormatError(
                    "The gzip file is damaged and can't be expanded; compress it again.", param="file"
                ) from error
            num_out += len(block)
            _check_expansion(num_in, num_out, limits)
            if block:
                yield block
            waiting = inflate.unused_data if inflate.eof else inflate.unconsumed_tail
            # A full block may have left more inside, also where all that came was taken.
            if not waiting and len(block) < _BLOCK_BYTES:
                break
    if not inflate.eof:
        raise InvalidFileFormatError("The gzip file ends too early: it was cut. Send it again.", param="file")


def _slices(chunk: bytes) -> Iterator[bytes]:
    return (chunk[start : start + _SLICE_BYTES] for start in range(0, len(chunk), _SLICE_BYTES))


def _check_expansion(num_in: int, num_out: int, limits: Limits) -> None:
    if num_out > limits.max_expanded_bytes:
        raise InvalidFileFormatError(
            f"The gzip file expands to more than {limits.max_expanded_bytes} bytes; split it, or ask the "
            "operator to raise LUTHIER_MAX_EXPANDED_BYTES.",
            param="file",
        )
    ratio = limits.max_expansion_ratio
    if num_out > _FREE_BYTES and num_out > ratio * num_in:
        raise InvalidFileFormatError(
            f"The gzip file expands to more than {ratio:g} times its size; send it unpacked, or ask the "
            "operator to raise LUTHIER_MAX_EXPANSION_RATIO.",
            param="file",
        )
