"""Prepared rows as tensors of micro-batches. Legend: B rows, T tokens, N all rows."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypedDict

import numpy as np
import torch
from numpy.typing import NDArray

from luthier.data.prepare.prepared_rows import PreparedRows
from luthier.modeling.training_protocols import Batch
from luthier.training.process_io import StoppedError


def row_lengths(rows: PreparedRows) -> NDArray[np.int64]:
    """Return every row's number of tokens, int64[N]."""
    return np.diff(rows.offsets)


def collate(rows: PreparedRows, row_numbers: NDArray[np.int64], pad_id: int) -> Batch:
    """Build the tensors of some rows, int64[B] numbers of them, on the CPU.

    `pad_id` fills the right; no real position sees it, and it is not supervised.
    """
    starts, ends = rows.offsets[row_numbers], rows.offsets[row_numbers + 1]
    longest = int((ends - starts).max())
    token_ids_BT = np.full((len(row_numbers), longest), pad_id, dtype=np.int64)
    supervised_BT = np.zeros((len(row_numbers), longest), dtype=bool)
    for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
        token_ids_BT[i, : end - start] = rows.tokens[start:end]
        supervised_BT[i, : end - start] = rows.supervised[start:end]
    supervised_BT[:, 0] = False
    return Batch(torch.from_numpy(token_ids_BT), torch.from_numpy(supervised_BT), int((ends - starts).sum()))


class ScoringOptions(TypedDict):
    """How rows are scored: padded tokens of a micro-batch at most, the id that pads, and when to stop."""

    max_tokens: int
    pad_id: int
    should_stop: Callable[[], bool]


def micro_batches(
    rows: PreparedRows,
    split: Callable[[NDArray[np.int64], NDArray[np.int64], int], Iterable[NDArray[np.int64]]],
    options: ScoringOptions,
) -> Iterator[tuple[NDArray[np.int64], Batch]]:
    """Yield numbers and tensors of all rows, cut by `split`; raises StoppedError when it is to stop."""
    for row_numbers in split(np.arange(rows.num_rows), row_lengths(rows), options["max_tokens"]):
        if options["should_stop"]():
            raise StoppedError
        yield row_numbers, collate(rows, row_numbers, options["pad_id"])


def count_supervised(rows: PreparedRows) -> NDArray[np.int64]:
    """Return how many tokens of every row are predicted, int64[N]; a row's first token never is."""
    supervised = rows.supervised.astype(np.int64)
    supervised[rows.offsets[:-1]] = 0
    return np.add.reduceat(supervised, rows.offsets[:-1])
