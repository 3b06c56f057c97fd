"""The seam between bytes that come in and rows that are checked: a check is fed bytes, and ends in facts.

Uploads know no more of rows than this. Another kind of check begins here, in `open_check`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from luthier.core.errors import InvalidFileFormatError
from luthier.core.purposes import FINE_TUNE
from luthier.core.settings import Settings
from luthier.data.plain_chat import count_plain_rows
from luthier.data.plain_rows import MAX_HELD_BLOCKS, RowCounter
from luthier.data.validate import FileChecker, FileFacts

# The first bytes are given on as they come: they tell what the file is.
_HEAD_BYTES = 4096
# What is kept of a line that has not ended; a longer one is judged as it comes.
_MAX_REST_BYTES = 1024 * 1024
# Plain rows of a larger file are counted in a process of their own, which takes a moment to start.
_MAX_BYTES_COUNTED_HERE = 32 * 1024 * 1024


@dataclass(frozen=True)
class RowLimits:
    """What rows of a training file may cost their check.

    The longest row, and what a compressed file may expand to, in bytes and as a multiple of its size.
    """

    max_line_bytes: int
    max_expanded_bytes: int
    max_expansion_ratio: float

    @classmethod
    def of(cls, settings: Settings) -> "RowLimits":
        """Return the limits that an operator has set."""
        return cls(settings.max_line_bytes, settings.max_expanded_bytes, settings.max_expansion_ratio)


class Check(Protocol):
    """What a file is judged by while its bytes stream by, with constant memory."""

    @property
    def needs_file(self) -> bool:
        """Whether `finish` must be given the whole file: what came can only be read from its end."""

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes.

        Args:
            chunk: any number of bytes.

        Raises:
            InvalidFileFormatError: once the file is known to break its format.
        """

    def finish(self, path: Path | None = None, /) -> FileFacts:
        """Say that no more bytes follow.

        Args:
            path: the whole file, which is read where `needs_file` is True.

        Returns:
            What is known of the file.

        Raises:
            InvalidFileFormatError: when the file breaks its format.
        """

    def close(self) -> None:
        """Let go of what the check holds; after this it judges nothing any more."""


class RowCheck:
    """The check of a training file: every row of it, in blocks of whole lines.

    Args:
        limits: what its rows may cost.
    """

    def __init__(self, limits: RowLimits) -> None:
        self._checker = FileChecker(
            max_line_bytes=limits.max_line_bytes,
            max_expanded_bytes=limits.max_expanded_bytes,
            max_expansion_ratio=limits.max_expansion_ratio,
        )
        self._counter = RowCounter()
        self._num_bytes = 0
        # The begin of a line; given on as it is once it is long.
        self._rest = b""
        self._is_within_line = False

    @property
    def needs_file(self) -> bool:
        """Whether what came is Parquet, which `finish` reads from the whole file."""
        self._end_counts(0)
        self._give_rest()
        return self._checker.needs_file

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes."""
        is_head = self._num_bytes < _HEAD_BYTES
        self._num_bytes += len(chunk)
        if is_head:
            self._is_within_line = not chunk.endswith(b"\n")
            self._checker.feed(chunk)
            return
        end = chunk.rfind(b"\n") + 1
        if end == 0:
            self._rest += chunk
            if len(self._rest) > _MAX_REST_BYTES:
                self._end_counts(0)
                self._give_rest()
            return
        start = 0
        if self._is_within_line:
            start = chunk.find(b"\n") + 1
            self._end_counts(0)
            self._checker.feed(self._rest + chunk[:start])
            self._rest, self._is_within_line = b"", False
        if start < end:
            self._take_lines(b"".join((self._rest, memoryview(chunk)[start:end])))
        self._rest = chunk[end:]

    def _take_lines(self, lines: bytes) -> None:
        if self._num_bytes <= _MAX_BYTES_COUNTED_HERE or not self._checker.takes_plain_rows:
            self._end_counts(0)
            num_rows = count_plain_rows(lines) if self._checker.takes_plain_rows else None
            self._checker.take_lines(lines, num_rows)
            return
        self._end_counts(MAX_HELD_BLOCKS - 1)
        self._counter.put(lines)

    def _end_counts(self, num_left: int) -> None:
        """Take what was counted, but for the last blocks."""
        while self._counter.num_held > num_left:
            self._checker.take_lines(*self._counter.take())

    def _give_rest(self) -> None:
        if self._rest:
            self._checker.feed(self._rest)
            self._rest, self._is_within_line = b"", True

    def finish(self, path: Path | None = None, /) -> FileFacts:
        """Say that no more bytes follow."""
        self._end_counts(0)
        self._give_rest()
        return self._checker.finish(path)

    def close(self) -> None:
        """End the process that counted, if there is one."""
        self._counter.close()


class OpaqueCheck:
    """The check of a file whose content nobody looks at: it has bytes, and no rows."""

    needs_file = False

    def __init__(self) -> None:
        self._num_bytes = 0

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes."""
        self._num_bytes += len(chunk)

    def finish(self, _path: Path | None = None, /) -> FileFacts:
        """Say that no more bytes follow; an empty file is refused."""
        if self._num_bytes == 0:
            raise InvalidFileFormatError("The file is empty.", param="file")
        return FileFacts(0, self._num_bytes)

    def close(self) -> None:
        """Do nothing: nothing is held."""


def open_check(purpose: str, limits: RowLimits) -> Check:
    """Begin the check of a file.

    Args:
        purpose: what the file is for; only training files have rows to check.
        limits: what rows may cost.

    Returns:
        The check, yet to be fed.
    """
    return RowCheck(limits) if purpose == FINE_TUNE else OpaqueCheck()


class UndecidedCheck:
    """The check of a file whose purpose follows its bytes: a fault of its rows counts once that is known.

    Args:
        limits: what rows may cost.
    """

    def __init__(self, limits: RowLimits) -> None:
        self._opaque = OpaqueCheck()
        self._rows = open_check(FINE_TUNE, limits)
        self._fault: InvalidFileFormatError | None = None
        self._purpose = FINE_TUNE

    @property
    def needs_file(self) -> bool:
        """Whether `finish` must be given the whole file."""
        return self._purpose == FINE_TUNE and self._fault is None and self._rows.needs_file

    def decide(self, purpose: str) -> None:
        """Say what the file is for; bytes may have been fed before."""
        self._purpose = purpose

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes."""
        self._opaque.feed(chunk)
        if self._fault is None:
            try:
                self._rows.feed(chunk)
            except InvalidFileFormatError as fault:
                self._fault = fault

    def finish(self, path: Path | None = None, /) -> FileFacts:
        """Say that no more bytes follow.

        Args:
            path: the whole file, which is read where `needs_file` is True.

        Returns:
            What is known of the file.

        Raises:
            InvalidFileFormatError: when a training file breaks its format, or the file is empty.
        """
        if self._purpose != FINE_TUNE:
            return self._opaque.finish()
        if self._fault is not None:
            raise self._fault
        return self._rows.finish(path)

    def close(self) -> None:
        """Let go of what the check of its rows holds."""
        self._rows.close()
