"""Counting a file's tokens without keeping them: all rows of a small file, an even sample of a large one.

What prepare would refuse is counted here, not raised: an estimate says how many rows have a fault.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from luthier.core.errors import InvalidValueError
from luthier.core.specs import TooLong
from luthier.data.formats.base import Row, RowFormat
from luthier.data.mask import RenderedRow, encode_rows, mask_tokens, render_row
from luthier.data.readers import clean_line, is_blank
from luthier.data.render import ChatTemplate
from luthier.data.rows import as_json_lines, find_file_format
from luthier.data.tokens import Encoding, Tokenizer

_BATCH_ROWS = 128
_BATCH_BYTES = 1024 * 1024


@dataclass(frozen=True)
class RowCounts:
    """Tokens of the rows that would be trained on, as far as they were counted.

    `lengths` and `supervised` are int64[N], after truncation, in an order of no meaning. `num_rows` are in
    the file, `num_read` were counted; of these `num_too_long` are over the limit, `num_faulty` could not be
    rendered or have no supervised token.
    """

    lengths: NDArray[np.int64]
    supervised: NDArray[np.int64]
    num_rows: int
    num_read: int
    num_too_long: int
    num_faulty: int

    @property
    def is_sampled(self) -> bool:
        """Whether rows were left out, so that totals are a sample's times its share."""
        return self.num_read < self.num_rows

    @property
    def scale(self) -> float:
        """How many rows of the file one that was counted stands for."""
        return self.num_rows / self.num_read if self.num_read else 1.0

    @property
    def num_kept(self) -> int:
        """Rows of the file that would be trained on; a sample's share of them where it is one."""
        return round(len(self.lengths) * self.scale)


def count_rows(
    path: Path, base_folder: Path, *, max_length: int, too_long: TooLong, max_rows: int, max_seconds: float
) -> RowCounts:
    """Count the tokens of a file's rows.

    Args:
        path: the file, checked at upload.
        base_folder: a fetched base, for its template and tokenizer.
        max_length: longest row in tokens.
        too_long: what would be done with a longer row; with "error" it is left out here, and told.
        max_rows: rows that are counted one by one; of more, an even sample of so many.
        max_seconds: after so long no more rows are begun; those counted are an even sample.

    Returns:
        The counts.

    Raises:
        BaseUnavailableError: when the base has no template or tokenizer that can be read.
        InvalidValueError: when the file holds preferences (param `training_file`).
    """
    deadline = time.monotonic() + max_seconds
    template, tokenizer = ChatTemplate.load(base_folder), Tokenizer.load(base_folder)
    row_format = find_file_format(path)
    if row_format is not None and row_format.name == "preference":
        raise InvalidValueError(
            "The file holds preferences, which belong to jobs of method dpo; a supervised job learns from "
            "rows such as chats.",
            param="training_file",
        )
    with as_json_lines(path) as lines:
        return _count_lines(
            lines, row_format, template, tokenizer, max_length, too_long, max_rows=max_rows, deadline=deadline
        )


def _count_lines(
    path: Path,
    row_format: RowFormat | None,
    template: ChatTemplate,
    tokenizer: Tokenizer,
    max_length: int,
    too_long: TooLong,
    *,
    max_rows: int,
    deadline: float,
) -> RowCounts:
    num_rows, places = _choose(path, max_rows)
    counted: list[tuple[int, int]] = []
    num_read = num_too_long = num_faulty = 0
    for lines in _batches(path, places):
        if num_read and time.monotonic() > deadline:
            break
        num_read += len(lines)
        rows = [None if row_format is None else row_format.read(line) for line in lines]
        for encoding, num_supervised in _tokenize(rows, template, tokenizer, max_length, too_long):
            if encoding is None:
                num_faulty += 1
                continue
            is_too_long = len(encoding.ids) > max_length
            num_too_long += is_too_long
            if is_too_long and too_long != "truncate":
                continue
            if num_supervised == 0:
                num_faulty += 1
                continue
            counted.append((min(len(encoding.ids), max_length), num_supervised))
    lengths, supervised = np.array(counted, dtype=np.int64).reshape(-1, 2).T
    return RowCounts(lengths, supervised, num_rows, num_read, num_too_long, num_faulty)


def _choose(path: Path, max_rows: int) -> tuple[int, list[tuple[int, int]]]:
    """Return the number of rows, and number and place in the file of an even sample, in a random order.

    Any beginning of that order is an even sample too.
    """
    starts: list[int] = []
    with path.open("rb") as stream:
        place = 0
        for raw in stream:
            if not is_blank(raw.removesuffix(b"\n")):
                starts.append(place)
            place += len(raw)
    chosen = np.unique(np.linspace(0, len(starts) - 1, min(max_rows, len(starts))).astype(np.int64))
    order = np.random.default_rng(0).permutation(chosen)
    return len(starts), [(int(index) + 1, starts[index]) for index in order]


def _batches(path: Path, places: Sequence[tuple[int, int]]) -> Iterator[list[bytes]]:
    batch: list[bytes] = []
    num_bytes = 0
    with path.open("rb") as stream:
        for number, place in places:
            stream.seek(place)
            line = _clean(stream.readline(), number)
            batch.append(line)
            num_bytes += len(line)
            if len(batch) == _BATCH_ROWS or num_bytes >= _BATCH_BYTES:
                yield batch
                batch, num_bytes = [], 0
    if batch:
        yield batch


def _clean(raw: bytes, number: int) -> bytes:
    return clean_line(raw.removesuffix(b"\n"), number)


def _tokenize(
    rows: list[Row | None], template: ChatTemplate, tokenizer: Tokenizer, max_length: int, too_long: TooLong
) -> Iterator[tuple[Encoding | None, int]]:
    """Yield every row's tokens and how many of those that stay are supervised; no tokens for a fault."""
    rendered: list[RenderedRow | None] = []
    for row in rows:
        try:
            rendered.append(None if row is None else render_row(template, row))
        except InvalidValueError:
            rendered.append(None)
    encodings = iter(encode_rows(tokenizer, [one for one in rendered if one is not None]))
    for one in rendered:
        if one is None:
            yield None, 0
            continue
        encoding = next(encodings)
        try:
            mask = mask_tokens(encoding, one.spans, tokenizer.stop_token_ids)
        except InvalidValueError:
            yield None, 0
            continue
        kept = mask[:max_length] if too_long == "truncate" else mask
        # A row's first token is never predicted.
        yield encoding, int(kept[1:].sum())
