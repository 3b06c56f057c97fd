"""The check of an upload: it is fed the bytes as they arrive, and ends in the facts of the file.

Only training files have their rows checked; purposes are in OpenAI's words.
"""

import hashlib
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path

from luthier.core.errors import InvalidFileFormatError, InvalidValueError, UnsupportedValueError
from luthier.core.settings import Settings
from luthier.data.readers import gzip_stream, parquet
from luthier.data.readers.base import Limits
from luthier.data.readers.check_process import CheckProcess
from luthier.data.readers.file_checker import FileFacts, check_rows

FINE_TUNE = "fine-tune"
INPUT_PURPOSES = ("assistants", "batch", FINE_TUNE, "vision", "user_data", "evals")
# What the service itself makes; OpenAI's API has them in answers only.
OUTPUT_PURPOSES = ("assistants_output", "batch_output", "fine-tune-results")

# Kinds of content that can't be rows, so that gigabytes of it are refused before they are sent.
_NEVER_ROWS = ("image/", "audio/", "video/", "font/", "application/pdf")


def check_input_purpose(purpose: str) -> str:
    """Return a purpose that a client may give a file.

    Raises:
        UnsupportedValueError: when only the service makes files of that purpose.
        InvalidValueError: when there is no such purpose.
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
    """Refuse pictures, sounds and the like as training files.

    Nothing else is inferred from the type: clients send many names for the same rows.
    """
    if purpose == FINE_TUNE and mime_type.strip().lower().startswith(_NEVER_ROWS):
        raise InvalidValueError(
            f"mime_type: {mime_type[:40]!r} can't be a training file; send JSON lines, as 'text/jsonl'.",
            param="mime_type",
        )


# A larger file is checked in a process of its own, which takes a moment to start.
_MAX_BYTES_HERE = 256 * 1024
# Small ones are checked one at a time: more threads would hold the GIL, which the event loop needs.
_ONE_HERE = threading.Lock()

# Reserves one such process; raises where there is none left.
TakePlace = Callable[[], AbstractContextManager[object]]


def row_limits(settings: Settings) -> Limits:
    """Return what rows of a training file may cost their check, as an operator has set it."""
    return Limits(
        settings.max_line_bytes,
        settings.max_expanded_bytes,
        settings.max_expansion_ratio,
        settings.max_training_rows,
    )


class UploadCheck:
    """Checks a file while its bytes arrive, with constant memory: a small file here, others in a process.

    Args:
        purpose: what the file is for; None where that follows its bytes: then a fault of its rows counts
            once `decide` has named the purpose.
        take_place: called before a process is started.
    """

    def __init__(self, purpose: str | None, limits: Limits, take_place: TakePlace = nullcontext) -> None:
        self._purpose = purpose or FINE_TUNE
        self._is_decided = purpose is not None
        self._limits, self._take_place = limits, take_place
        self._held = ExitStack()
        self._num_bytes = 0
        # The beginning of the file, until it is known where it is checked.
        self._waiting = bytearray()
        self._is_parquet = False
        self._process: CheckProcess | None = None
        self._fault: InvalidFileFormatError | None = None
        self._expected_md5 = ""
        # Not for security: it finds parts that were lost or mixed up on their way.
        self._md5 = hashlib.md5(usedforsecurity=False)

    @property
    def needs_file(self) -> bool:
        """Whether `finish` must be given the whole file: Parquet is read from its end."""
        return self._is_parquet and self._purpose == FINE_TUNE and self._fault is None

    def decide(self, purpose: str) -> None:
        """Name the purpose; bytes may have been fed before."""
        self._purpose = purpose

    def require_md5(self, md5: str) -> None:
        """Require a hash of the whole file, 32 hex digits, before its first byte."""
        self._expected_md5 = md5

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes.

        Raises:
            InvalidFileFormatError: once a training file is known to break its format.
        """
        self._num_bytes += len(chunk)
        if self._expected_md5:
            self._md5.update(chunk)
        if self._purpose != FINE_TUNE or self._fault is not None or self._is_parquet:
            return
        try:
            self._feed_rows(chunk)
        except InvalidFileFormatError as fault:
            if self._is_decided:
                raise
            self._fault = fault

    def _feed_rows(self, chunk: bytes) -> None:
        if self._process is not None:
            self._process.feed(chunk)
            return
        self._waiting += chunk
        self._is_parquet = self._waiting.startswith(parquet.MAGIC)
        is_packed = self._waiting.startswith(gzip_stream.MAGIC)
        if self._is_parquet:
            self._waiting.clear()
        elif is_packed or len(self._waiting) > _MAX_BYTES_HERE:
            self._start(None).feed(bytes(self._waiting))
            self._waiting.clear()

    def _start(self, path: Path | None) -> CheckProcess:
        self._held.enter_context(self._take_place())
        self._process = CheckProcess(self._limits, path)
        return self._process

    def finish(self, path: Path | None = None, /) -> FileFacts:
        """Return the facts of the file, all of which was fed.

        Args:
            path: the whole file, which is read where `needs_file` is True.

        Raises:
            InvalidFileFormatError: when a training file breaks its format, or the file is empty.
            InvalidValueError: when it has another hash than the required one (param `md5`).
        """
        if self._expected_md5 and (found := self._md5.hexdigest()) != self._expected_md5:
            raise InvalidValueError(
                f"md5: the parts in this order hash to {found}, not to {self._expected_md5}; check their "
                "order, or send them again.",
                param="md5",
            )
        if self._purpose != FINE_TUNE:
            if self._num_bytes == 0:
                raise InvalidFileFormatError("The file is empty.", param="file")
            return FileFacts(0, self._num_bytes)
        if self._fault is not None:
            raise self._fault
        if self._is_parquet and path is not None:
            self._start(path)
        if self._process is not None:
            return self._process.finish()
        with _ONE_HERE:
            return check_rows([bytes(self._waiting)], self._limits)

    def stop(self) -> None:
        """End what `feed` or `finish` is doing in another thread."""
        if self._process is not None:
            self._process.kill()

    def close(self) -> None:
        """End the process and give its place back; no thread may feed it any more."""
        if self._process is not None:
            self._process.close()
        self._held.close()
