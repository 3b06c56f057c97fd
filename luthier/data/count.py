"""Counting a file's tokens without keeping them: all rows of a small file, an even sample of a large one.

What prepare would refuse is counted here, not raised: an estimate says how many rows have a fault.
"""

import functools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from luthier.core.errors import InvalidValueError
from luthier.core.specs import TooLong
from luthier.data.formats.base import RowFormat
from luthier.data.mask import RenderedRow, encode_rows, mask_tokens, render_parts
from luthier.data.objectives import Purpose, learns_from, tell_wrong_format
from luthier.data.readers import clean_line, is_blank
from luthier.data.render import ChatTemplate
from luthier.data.rows import as_json_lines, find_file_format
from luthier.data.tokens import Encoding, Tokenizer

_BATCH_ROWS = 128
_BATCH_BYTES = 1024 * 1024


@dataclass(frozen=True)
class RowCounts:
    """Tokens of the rows that would be trained on, as far as they were counted.

    `lengths` and `supervised` are int64[N], after truncation, in an order of no meaning; of preferences two
    a row of the file, beside each other (luthier.data.pairs). The other numbers are of the file's rows:
    `num_rows` are in it, `num_read` were counted; of these `num_too_long` are over the limit, `num_faulty`
    could not be rendered or have nothing to learn. All counted rows begin with the same `num_shared` tokens,
    none of which predicts one that is learnt; `pair_shared`, int64[N/2], are those that the two rows of each
    preference begin with.
    """

    lengths: NDArray[np.int64]
    supervised: NDArray[np.int64]
    num_rows: int
    num_read: int
    num_too_long: int
    num_faulty: int
    has_pairs: bool = False
    num_shared: int = 0
    pair_shared: NDArray[np.int64] | None = None

    @property
    def num_examples(self) -> int:
        """Rows of the file, each perhaps a pair, whose lengths are here."""
        return len(self.lengths) // (2 if self.has_pairs else 1)

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
        return round(self.num_examples * self.scale)


def count_rows(
    path: Path,
    base_folder: Path,
    *,
    max_length: int,
    too_long: TooLong,
    max_rows: int,
    max_seconds: float,
    purpose: Purpose = "training",
    wants_pairs: bool = False,
) -> RowCounts:
    """Count the tokens of a file's rows.

    Args:
        base_folder: a fetched base, for its template and tokenizer.
        max_length: longest row in tokens.
        too_long: what would be done with a longer row; with "error" it is left out here, and told.
        max_rows: rows that are counted one by one; of more, an even sample of so many.
        max_seconds: after so long no more rows are begun; those counted are an even sample.
        purpose: which of a job's files it is, for the error.
        wants_pairs: whether the job learns from preferences, each of which is two rows of tokens.

    Raises:
        BaseUnavailableError: when the base has no template or tokenizer that can be read.
        InvalidValueError: when the file's rows are not of the kind that the job learns from (param
            `training_file` or `validation_file`).
    """
    deadline = time.monotonic() + max_seconds
    template, tokenizer = ChatTemplate.load(base_folder), Tokenizer.load(base_folder)
    row_format = find_file_format(path)
    if row_format is not None and not learns_from(row_format.name, wants_pairs=wants_pairs):
        raise InvalidValueError(tell_wrong_format(purpose, row_format.name), param=f"{purpose}_file")
    counting = _Counting(row_format, template, tokenizer, max_length, too_long)
    with as_json_lines(path) as lines:
        num_rows, places = _choose(lines, max_rows)
        for batch in _batches(lines, places):
            if counting.num_read and time.monotonic() > deadline:
                break
            counting.add(batch)
    lengths, supervised = np.array(counting.counted, dtype=np.int64).reshape(-1, 2).T
    return RowCounts(
        lengths,
        supervised,
        num_rows,
        counting.num_read,
        counting.num_too_long,
        counting.num_faulty,
        has_pairs=wants_pairs,
        num_shared=counting.num_shared,
        pair_shared=np.array(counting.pair_shared, dtype=np.int64) if wants_pairs else None,
    )


@dataclass
class _Counting:
    """Counts rows as prepare judges them; a preference as the two rows of tokens that it becomes."""

    row_format: RowFormat | None
    template: ChatTemplate
    tokenizer: Tokenizer
    max_length: int
    too_long: TooLong
    counted: list[tuple[int, int]] = field(default_factory=list)
    num_read: int = 0
    num_too_long: int = 0
    num_faulty: int = 0
    pair_shared: list[int] = field(default_factory=list)
    _shared: NDArray[np.int32] | None = None

    @property
    def num_shared(self) -> int:
        """Tokens that all counted rows begin with, before any that predicts one that is learnt."""
        return 0 if self._shared is None else len(self._shared)

    def add(self, lines: list[bytes]) -> None:
        rendered = [self._render(line) for line in lines]
        encodings = encode_rows(self.tokenizer, [row for rows in rendered for row in rows])
        self.num_read += len(lines)
        self.num_faulty += rendered.count(())
        start = 0
        for rows in filter(None, rendered):
            self._judge(rows, encodings[start : start + len(rows)])
            start += len(rows)

    def _render(self, line: bytes) -> tuple[RenderedRow, ...]:
        """Return the texts that a row of the file becomes; none for a fault."""
        row = None if self.row_format is None else self.row_format.read(line)
        if row is None:
            return ()
        try:
            return render_parts(self.template, row)
        except InvalidValueError:
            return ()

    def _judge(self, rows: tuple[RenderedRow, ...], encodings: Sequence[Encoding]) -> None:
        stops, limit = self.tokenizer.stop_token_ids, self.max_length
        try:
            masks = [
                mask_tokens(encoding, row.spans, stops) for encoding, row in zip(encodings, rows, strict=True)
            ]
        except InvalidValueError:
            self.num_faulty += 1
            return
        is_too_long = max(len(encoding.ids) for encoding in encodings) > limit
        self.num_too_long += is_too_long
        if is_too_long and self.too_long != "truncate":
            return
        # A row's first token is never predicted.
        found = [
            (min(len(encoding.ids), limit), int(mask[1:limit].sum()))
            for encoding, mask in zip(encodings, masks, strict=True)
        ]
        has_nothing = any(num_supervised == 0 for _, num_supervised in found)
        if has_nothing or (self.too_long == "truncate" and _are_equal(encodings, limit)):
            self.num_faulty += 1
            return
        self.counted += found
        beginnings = [
            encoding.ids[: int(mask[1:limit].argmax())]
            for encoding, mask in zip(encodings, masks, strict=True)
        ]
        shared = functools.reduce(_shared_beginning, beginnings)
        if len(rows) > 1:
            self.pair_shared.append(len(shared))
        self._shared = shared if self._shared is None else _shared_beginning(self._shared, shared)


def _shared_beginning(one: NDArray[np.int32], other: NDArray[np.int32]) -> NDArray[np.int32]:
    both = min(len(one), len(other))
    differing = (one[:both] != other[:both]).nonzero()[0]
    return one[: differing[0] if len(differing) else both]


def _are_equal(encodings: Sequence[Encoding], limit: int) -> bool:
    """Whether two answers are the same as far as they are kept."""
    return len(encodings) == 2 and np.array_equal(encodings[0].ids[:limit], encodings[1].ids[:limit])


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
