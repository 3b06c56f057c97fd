"""Counts of a file's tokens in bounded time and memory: all rows of a small file, a sample of a large one.

Rows that prepare would refuse are counted, not raised.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from luthier.core.errors import InvalidFileFormatError, InvalidValueError
from luthier.core.specs import TooLong
from luthier.data.formats.base import Fault, RowFormat
from luthier.data.prepare.objectives import Purpose, learns_from, wrong_format_message
from luthier.data.prepare.preparation import are_equal_when_cut
from luthier.data.readers.file_rows import FileRows
from luthier.data.rendering.chat_template import ChatTemplate
from luthier.data.rendering.loss_mask import MaskedText, Refusal, mask_rows
from luthier.data.rendering.tokenizer import Tokenizer

# Bytes read, unpacked, of a file that can only be read from its beginning.
SAMPLE_BYTES = 64 * 1024 * 1024
_BATCH_ROWS = 128
# Rows between two looks at the clock.
_ROWS_PER_LOOK = 64
_BATCH_BYTES = 1024 * 1024
_PACKED = (b"\x1f\x8b", b"PAR1")


@dataclass(frozen=True)
class RowCounts:
    """Tokens of the rows that would be trained on, as far as they were counted.

    `num_tokens`, `num_supervised` and `longest` are after truncation; a row of preferences counts both its
    conversations (luthier.data.prepare.preference_pairs). The other numbers are rows of the file: `num_rows`
    are in it, `num_read` were counted; of these `num_examples` would be trained on, `num_too_long` are over
    the limit, `num_faulty` could not be rendered or have nothing to learn. `is_first_rows`: the sample is
    not an even one but the file's first rows.
    """

    num_rows: int
    num_read: int
    num_examples: int
    num_too_long: int
    num_faulty: int
    num_tokens: int
    num_supervised: int
    longest: int
    has_pairs: bool = False
    is_first_rows: bool = False

    @property
    def scale(self) -> float:
        """Rows of the file for each that was counted."""
        return self.num_rows / self.num_read if self.num_read else 1.0

    @property
    def num_kept(self) -> int:
        """Rows of the file that would be trained on, estimated from a sample."""
        return round(self.num_examples * self.scale)


def count_rows(
    path: Path,
    base_folder: Path,
    *,
    num_rows: int,
    max_length: int,
    too_long: TooLong,
    max_rows: int,
    max_seconds: float,
    is_whole: bool = True,
    purpose: Purpose = "training",
    wants_pairs: bool = False,
) -> RowCounts:
    """Count the tokens of a file's rows.

    Args:
        path: the file, checked at upload, or its beginning (`is_whole` False).
        base_folder: a fetched base, for its template and tokenizer.
        num_rows: rows of the whole file.
        max_length: longest row in tokens.
        too_long: as for prepare; with "error" a longer row is left out here, and counted.
        max_rows: rows that are counted one by one; of more an even sample, of a packed file the first.
        max_seconds: time after which no more rows are read.
        wants_pairs: whether the job learns from preferences, each of which is two rows of tokens.

    Raises:
        BaseUnavailableError: when the base has no template or tokenizer that can be read.
        InvalidValueError: when the file's rows are not of the kind that the job learns from (param
            `training_file` or `validation_file`).
    """
    deadline = time.monotonic() + max_seconds
    rows = FileRows(path)
    is_sequential = not is_whole or _is_packed(path)
    chosen = _choose(num_rows, max_rows, is_sequential=is_sequential)
    counting = _Counting(ChatTemplate.load(base_folder), Tokenizer.load(base_folder), max_length, too_long)
    max_bytes = SAMPLE_BYTES if is_sequential else None
    for batch in _batches(rows, chosen, max_bytes=max_bytes, deadline=deadline, is_whole=is_whole):
        row_format = rows.format
        if row_format is not None and not learns_from(row_format.name, wants_pairs=wants_pairs):
            raise InvalidValueError(wrong_format_message(purpose, row_format.name), param=f"{purpose}_file")
        counting.add(row_format, batch)
    return RowCounts(
        num_rows=num_rows,
        num_read=counting.num_read,
        num_examples=counting.num_kept_rows,
        num_too_long=counting.num_too_long,
        num_faulty=counting.num_faulty,
        num_tokens=counting.num_tokens,
        num_supervised=counting.num_supervised,
        longest=counting.longest,
        has_pairs=wants_pairs,
        is_first_rows=counting.num_read < (num_rows if is_sequential else len(chosen)),
    )


def _is_packed(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(4).startswith(_PACKED)


def _choose(num_rows: int, max_rows: int, *, is_sequential: bool) -> Sequence[int]:
    """Return the places of the rows to count, ascending."""
    if is_sequential or num_rows <= max_rows:
        return range(min(num_rows, max_rows))
    return [int(place) for place in np.linspace(0, num_rows - 1, max_rows)]


def _batches(
    rows: FileRows, chosen: Sequence[int], *, max_bytes: int | None, deadline: float, is_whole: bool
) -> Iterator[list[bytes]]:
    """Yield the chosen rows in batches; an empty line for one with a fault. Reads the file once."""
    batch: list[bytes] = []
    num_bytes = num_all_bytes = 0
    places = iter(chosen)
    place = next(places, None)
    try:
        for index, raw in enumerate(rows.raw()):
            content = b"" if isinstance(raw, Fault) else raw.content
            num_all_bytes += len(content)
            if index == place:
                batch.append(content)
                num_bytes += len(content)
                place = next(places, None)
            if batch and (len(batch) == _BATCH_ROWS or num_bytes >= _BATCH_BYTES):
                yield batch
                batch, num_bytes = [], 0
            is_late = index % _ROWS_PER_LOOK == 0 and time.monotonic() > deadline
            if place is None or is_late or (max_bytes is not None and num_all_bytes > max_bytes):
                break
    except InvalidFileFormatError:
        # A file's beginning may end anywhere.
        if is_whole:
            raise
    if batch:
        yield batch


@dataclass
class _Counting:
    """Counts rows as prepare judges them; a preference as the two rows of tokens that it becomes."""

    template: ChatTemplate
    tokenizer: Tokenizer
    max_length: int
    too_long: TooLong
    num_read: int = 0
    num_kept_rows: int = 0
    num_too_long: int = 0
    num_faulty: int = 0
    num_tokens: int = 0
    num_supervised: int = 0
    longest: int = 0

    def add(self, row_format: RowFormat | None, lines: list[bytes]) -> None:
        read = [] if row_format is None else [row_format.read(line) for line in lines]
        rows = [row for row in read if row is not None]
        self.num_read += len(lines)
        self.num_faulty += len(lines) - len(rows)
        for texts in mask_rows(self.template, self.tokenizer, rows):
            if isinstance(texts, Refusal):
                self.num_faulty += 1
            else:
                self._count(texts)

    def _count(self, texts: Sequence[MaskedText]) -> None:
        limit = self.max_length
        is_too_long = max(len(one.encoding.ids) for one in texts) > limit
        self.num_too_long += is_too_long
        if is_too_long and self.too_long != "truncate":
            return
        # A row's first token is never predicted.
        num_supervised = [int(one.mask[1:limit].sum()) for one in texts]
        is_equal = self.too_long == "truncate" and are_equal_when_cut(texts, limit)
        if is_equal or 0 in num_supervised:
            self.num_faulty += 1
            return
        lengths = [min(len(one.encoding.ids), limit) for one in texts]
        self.num_kept_rows += 1
        self.num_tokens += sum(lengths)
        self.num_supervised += sum(num_supervised)
        self.longest = max(self.longest, *lengths)
