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
from luthier.data.formats.base import Fault, Row
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


@dataclass
class RowCounts:
    """Tokens of the rows that would be trained on, as far as they were counted.

    `num_tokens`, `num_supervised` and `longest` are after truncation; a row of preferences counts both its
    conversations (luthier.data.prepare.preference_pairs). The other numbers are rows of the file: `num_rows`
    are in it, `num_read` were counted; of these `num_examples` would be trained on, `num_too_long` are over
    the limit, `num_faulty` could not be rendered or have nothing to learn. `is_first_rows`: the sample is
    not an even one but the file's first rows.
    """

    num_rows: int
    has_pairs: bool = False
    num_read: int = 0
    num_examples: int = 0
    num_too_long: int = 0
    num_faulty: int = 0
    num_tokens: int = 0
    num_supervised: int = 0
    longest: int = 0
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
    template, tokenizer = ChatTemplate.load(base_folder), Tokenizer.load(base_folder)
    counts = RowCounts(num_rows, wants_pairs)
    max_bytes = SAMPLE_BYTES if is_sequential else None
    for batch in _batches(rows, chosen, max_bytes=max_bytes, deadline=deadline, is_whole=is_whole):
        if rows.format is not None and not learns_from(rows.format.name, wants_pairs=wants_pairs):
            raise InvalidValueError(wrong_format_message(purpose, rows.format.name), param=f"{purpose}_file")
        sound = [row for row in batch if row is not None]
        counts.num_read += len(batch)
        counts.num_faulty += len(batch) - len(sound)
        for texts in mask_rows(template, tokenizer, sound):
            if isinstance(texts, Refusal):
                counts.num_faulty += 1
            else:
                _count(counts, texts, max_length, too_long)
    counts.is_first_rows = counts.num_read < (num_rows if is_sequential else len(chosen))
    return counts


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
) -> Iterator[list[Row | None]]:
    """Yield the chosen rows in batches; None for one with a fault. Reads the file once."""
    batch: list[Row | None] = []
    num_bytes = num_all_bytes = 0
    places = iter(chosen)
    place = next(places, None)
    try:
        for index, raw in enumerate(rows.raw()):
            size = 0 if isinstance(raw, Fault) else len(raw.content)
            num_all_bytes += size
            if index == place:
                [found, *_] = [raw] if isinstance(raw, Fault) else rows.read(raw)
                batch.append(None if isinstance(found, Fault) else found[1])
                num_bytes += size
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


def _count(counts: RowCounts, texts: Sequence[MaskedText], limit: int, too_long: TooLong) -> None:
    """Count a row as prepare judges it; a preference as the two rows of tokens that it becomes."""
    is_too_long = max(len(one.encoding.ids) for one in texts) > limit
    counts.num_too_long += is_too_long
    if is_too_long and too_long != "truncate":
        return
    # A row's first token is never predicted.
    num_supervised = [int(one.mask[1:limit].sum()) for one in texts]
    is_equal = too_long == "truncate" and are_equal_when_cut(texts, limit)
    if is_equal or 0 in num_supervised:
        counts.num_faulty += 1
        return
    lengths = [min(len(one.encoding.ids), limit) for one in texts]
    counts.num_examples += 1
    counts.num_tokens += sum(lengths)
    counts.num_supervised += sum(num_supervised)
    counts.longest = max(counts.longest, *lengths)
