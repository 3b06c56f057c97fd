"""Gzip (RFC 1952), expanded as it arrives with the memory of one block, within limits."""

import zlib
from collections.abc import Iterator

from luthier.core.errors import InvalidFileFormatError
from luthier.data.readers.base import MIB, Limits

MAGIC = b"\x1f\x8b"
_BLOCK_BYTES = 256 * 1024
_SLICE_BYTES = 16 * 1024
# Always allowed, for short files of equal rows.
_FREE_BYTES = 16 * MIB
_WITH_GZIP_HEADER = 31


class Gunzip:
    """Expands a gzip file of one or more members."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._inflate = zlib.decompressobj(wbits=_WITH_GZIP_HEADER)
        self._num_in = self._num_out = 0
        self._is_between = False

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """Yield what the next bytes expand to, in blocks of at most 256 KiB.

        Raises:
            InvalidFileFormatError: when the file is damaged, or expands beyond the limits.
        """
        # What follows a member is copied at its end, so what is given to zlib is small.
        for start in range(0, len(chunk), _SLICE_BYTES):
            yield from self._feed(chunk[start : start + _SLICE_BYTES])

    def _feed(self, waiting: bytes) -> Iterator[bytes]:
        self._num_in += len(waiting)
        while True:
            if self._is_between:
                # Tools pad with zeros; a new member begins with a header of its own.
                waiting = waiting.lstrip(b"\0")
                if not waiting:
                    return
                self._inflate = zlib.decompressobj(wbits=_WITH_GZIP_HEADER)
                self._is_between = False
            try:
                block = self._inflate.decompress(waiting, _BLOCK_BYTES)
            except zlib.error as error:
                raise InvalidFileFormatError(
                    "The gzip file is damaged and can't be expanded; compress it again.", param="file"
                ) from error
            self._count(len(block))
            if block:
                yield block
            self._is_between = self._inflate.eof
            waiting = self._inflate.unused_data if self._is_between else self._inflate.unconsumed_tail
            # A full block may have left more inside, also where all that came was taken.
            if not waiting and len(block) < _BLOCK_BYTES:
                return

    def _count(self, num_bytes: int) -> None:
        self._num_out += num_bytes
        limit = self._limits.max_expanded_bytes
        if self._num_out > limit:
            raise InvalidFileFormatError(
                f"The gzip file expands to more than {limit} bytes; split it, or ask the operator to raise "
                "LUTHIER_MAX_EXPANDED_BYTES.",
                param="file",
            )
        ratio = self._limits.max_expansion_ratio
        if self._num_out > _FREE_BYTES and self._num_out > ratio * self._num_in:
            raise InvalidFileFormatError(
                f"The gzip file expands to more than {ratio:g} times its size; send it unpacked, or ask the "
                "operator to raise LUTHIER_MAX_EXPANSION_RATIO.",
                param="file",
            )

    def finish(self) -> None:
        """Refuse a file that ends within a member."""
        if not self._is_between:
            raise InvalidFileFormatError(
                "The gzip file ends too early: it was cut. Send it again.", param="file"
            )
