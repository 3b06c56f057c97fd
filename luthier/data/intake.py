"""The seam between bytes that come in and rows that are checked: a check is fed bytes, and ends in facts.

Uploads know no more of rows than this. Another kind of check begins here, in `open_check`.
"""

import hashlib
from typing import Protocol

from luthier.core.errors import InvalidFileFormatError
from luthier.core.purposes import FINE_TUNE
from luthier.data.validate import FileChecker, FileFacts


class Check(Protocol):
    """What a file is judged by while its bytes stream by, with constant memory."""

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes.

        Args:
            chunk: any number of bytes.

        Raises:
            InvalidFileFormatError: once the file is known to break its format.
        """

    def finish(self) -> FileFacts:
        """Say that no more bytes follow.

        Returns:
            Rows, bytes and sha256 of the file.

        Raises:
            InvalidFileFormatError: when the file breaks its format.
        """


class OpaqueCheck:
    """The check of a file whose content nobody looks at: it has bytes, and no rows."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()
        self._num_bytes = 0

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes."""
        self._sha256.update(chunk)
        self._num_bytes += len(chunk)

    def finish(self) -> FileFacts:
        """Say that no more bytes follow.

        Returns:
            Bytes and sha256 of the file; no rows.

        Raises:
            InvalidFileFormatError: when the file is empty.
        """
        if self._num_bytes == 0:
            raise InvalidFileFormatError("The file is empty.", param="file")
        return FileFacts(0, self._num_bytes, self._sha256.hexdigest())


def open_check(purpose: str, *, max_line_bytes: int) -> Check:
    """Begin the check of a file.

    Args:
        purpose: what the file is for; only training files have rows to check.
        max_line_bytes: longest line of a training file.

    Returns:
        The check, yet to be fed.
    """
    if purpose == FINE_TUNE:
        return FileChecker(max_line_bytes=max_line_bytes)
    return OpaqueCheck()


class UndecidedCheck:
    """The check of a file whose purpose follows its bytes: a fault of its rows counts once that is known.

    Args:
        max_line_bytes: longest line of a training file.
    """

    def __init__(self, *, max_line_bytes: int) -> None:
        self._opaque = OpaqueCheck()
        self._rows = open_check(FINE_TUNE, max_line_bytes=max_line_bytes)
        self._fault: InvalidFileFormatError | None = None
        self._purpose = FINE_TUNE

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

    def finish(self) -> FileFacts:
        """Say that no more bytes follow.

        Returns:
            Rows, bytes and sha256 of the file.

        Raises:
            InvalidFileFormatError: when a training file breaks its format, or the file is empty.
        """
        if self._purpose != FINE_TUNE:
            return self._opaque.finish()
        if self._fault is not None:
            raise self._fault
        return self._rows.finish()
