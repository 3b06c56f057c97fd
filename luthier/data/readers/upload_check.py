"""The check of an upload: it is fed the bytes as they arrive, and ends in the facts of the file.

`open_check` chooses it by the file's purpose, in OpenAI's words; only training files have their rows checked.
Uploads know no more of rows than this.
"""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Protocol

from luthier.core.errors import InvalidFileFormatError, InvalidValueError, UnsupportedValueError
from luthier.core.settings import Settings
from luthier.data.readers import gzip_stream, parquet
from luthier.data.readers.base import Limits
from luthier.data.readers.check_process import CheckProcess
from luthier.data.readers.file_checker import FileChecker, FileFacts

FINE_TUNE = "fine-tune"
INPUT_PURPOSES = ("assistants", "batch", FINE_TUNE, "vision", "user_data", "evals")
# What the service itself makes; OpenAI's API has them in answers only.
OUTPUT_PURPOSES = ("assistants_output", "batch_output", "fine-tune-results")

# Kinds of content that can't be rows, so that gigabytes of it are refused before they are sent.
_NEVER_ROWS = ("image/", "audio/", "video/", "font/", "application/pdf")


def check_input_purpose(purpose: str) -> str:
    """Return a purpose that a client may give a file.

    Args:
        purpose: as the client wrote it.

    Raises:
        UnsupportedValueError: when only the service makes files of that purpose.
        InvalidValueError: when there is none of that name.
    """
    if purpose in INPUT_PURPOSES:
        return purpose
    if purpose in OUTPUT_PURPOSES:
        raise UnsupportedValueError(
            f"purpose: files of purpose '{purpose}' are made by the service and can't be uploaded; "
            f"use one of {', '.join(INPUT_PURPOSES)}.",
            param="purpose",
        )
    raise InvalidValueError(
        f"purpose: {purpose[:40]!r} is unknown; use one of {', '.join(INPUT_PURPOSES)}.", param="purpose"
    )


def check_mime_type(mime_type: str, purpose: str) -> None:
    """Refuse a kind of content that can't be what the purpose says.

    Nothing else is inferred from it: clients send many names for the same rows.

    Args:
        mime_type: as the client wrote it.

    Raises:
        InvalidValueError: when it is a picture, a sound or the like for training.
    """
    if purpose == FINE_TUNE and mime_type.strip().lower().startswith(_NEVER_ROWS):
        raise InvalidValueError(
            f"mime_type: {mime_type[:40]!r} can't be a training file; send JSON lines, as 'text/jsonl'.",
            param="mime_type",
        )


# A larger file is checked in a process of its own, which takes a moment to start.
_MAX_BYTES_HERE = 256 * 1024
# Small ones are checked one at a time: more threads would keep the interpreter's lock from the event loop.
_ONE_HERE = threading.Lock()

# Holds a place for one such process; raises where there is none.
TakePlace = Callable[[], AbstractContextManager[object]]


def row_limits(settings: Settings) -> Limits:
    """Return what rows of a training file may cost their check, as an operator has set it."""
    return Limits(
        settings.max_line_bytes,
        settings.max_expanded_bytes,
        settings.max_expansion_ratio,
        settings.max_training_rows,
    )


class Check(Protocol):
    """What a file is judged by while its bytes stream by, with constant memory."""

    @property
    def needs_file(self) -> bool:
        """Whether `finish` must be given the whole file: what came can only be read from its end."""

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes.

        Raises:
            InvalidFileFormatError: once the file is known to break its format.
        """

    def finish(self, path: Path | None = None, /) -> FileFacts:
        """Say that no more bytes follow.

        Args:
            path: the whole file, which is read where `needs_file` is True.

        Raises:
            InvalidFileFormatError: when the file breaks its format.
        """

    def stop(self) -> None:
        """End what `feed` or `finish` is doing in another thread."""

    def close(self) -> None:
        """Release what the check holds, once nobody feeds it any more."""


class RowCheck:
    """The check of a training file: every row of it, a small file's here, others' in a process.

    Args:
        take_place: asked before a process is started.
    """

    def __init__(self, limits: Limits, take_place: TakePlace = nullcontext) -> None:
        self._limits = limits
        self._take_place = take_place
        self._held = ExitStack()
        # The beginning of the file, until it is known where it is checked.
        self._waiting = bytearray()
        self._process: CheckProcess | None = None
        self.needs_file = False

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes."""
        if self._process is not None:
            self._process.feed(chunk)
        elif not self.needs_file:
            self._waiting += chunk
            self.needs_file = self._waiting.startswith(parquet.MAGIC)
            is_packed = self._waiting.startswith(gzip_stream.MAGIC)
            if self.needs_file:
                self._waiting.clear()
            elif is_packed or len(self._waiting) > _MAX_BYTES_HERE:
                self._start(None).feed(bytes(self._waiting))
                self._waiting.clear()

    def _start(self, path: Path | None) -> CheckProcess:
        self._held.enter_context(self._take_place())
        self._process = CheckProcess(self._limits, path)
        return self._process

    def finish(self, path: Path | None = None, /) -> FileFacts:
        """Say that no more bytes follow."""
        if self.needs_file and path is not None:
            self._start(path)
        if self._process is not None:
            return self._process.finish()
        checker = FileChecker(self._limits)
        with _ONE_HERE:
            checker.feed(bytes(self._waiting))
            return checker.finish()

    def stop(self) -> None:
        """End the process, if there is one; who waits for it is refused."""
        if self._process is not None:
            self._process.kill()

    def close(self) -> None:
        """End the process and give its place back."""
        if self._process is not None:
            self._process.close()
        self._held.close()


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

    def stop(self) -> None:
        """Do nothing: nothing takes long."""

    def close(self) -> None:
        """Do nothing: nothing is held."""


def open_check(purpose: str, limits: Limits, take_place: TakePlace = nullcontext) -> Check:
    """Begin the check of a file; only training files have rows to check."""
    return RowCheck(limits, take_place) if purpose == FINE_TUNE else OpaqueCheck()


class UndecidedCheck:
    """The check of a file whose purpose follows its bytes: a fault of its rows counts once that is known."""

    def __init__(self, limits: Limits, take_place: TakePlace = nullcontext) -> None:
        self._opaque = OpaqueCheck()
        self._rows = RowCheck(limits, take_place)
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

        Raises:
            InvalidFileFormatError: when a training file breaks its format, or the file is empty.
        """
        if self._purpose != FINE_TUNE:
            return self._opaque.finish()
        if self._fault is not None:
            raise self._fault
        return self._rows.finish(path)

    def stop(self) -> None:
        """End the check of its rows."""
        self._rows.stop()

    def close(self) -> None:
        """Release what the check of its rows holds."""
        self._rows.close()
