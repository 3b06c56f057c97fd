"""The tensors of a micro-batch, and the plan of its steps (luthier.data.prepare.batch_plan).

Legend: B rows, T tokens.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from luthier.data.prepare.batch_plan import Plan, make_plan, order_epoch, split_micro
from luthier.data.prepare.prepared_rows import PreparedRows

__all__ = [
    "Batch",
    "Plan",
    "collate",
    "count_supervised",
    "make_plan",
    "order_epoch",
    "row_lengths",
    "split_micro",
]


# What it costs to compute shared tokens apart is about what this many tokens cost.
_MIN_SAVED_TOKENS = 16


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right to the longest of them.

    `token_ids_BT` int64; `supervised_BT` bool, true where the token is to be predicted (never at column
    0, which nothing precedes); `num_tokens` counts real tokens.
    """

    token_ids_BT: torch.Tensor
    supervised_BT: torch.Tensor
    num_tokens: int

    @property
    def num_needed(self) -> int:
        """Columns that scores depend on: the last supervised token is predicted, and nothing follows it."""
        columns = self._supervised_columns
        return max(1, columns[-1]) if columns else 1

    @property
    def num_shared(self) -> int:
        """Columns that all rows have alike at their beginning and that predict nothing supervised.

        0 where too few tokens would be saved by computing them once.
        """
        num_rows, num_columns = self.token_ids_BT.shape
        columns = self._supervised_columns
        differing = (self.token_ids_BT != self.token_ids_BT[:1]).any(dim=0).nonzero()
        num_alike = int(differing[0]) if len(differing) else num_columns
        found = min(num_alike, columns[0] - 1 if columns else 0)
        return found if found * (num_rows - 1) >= _MIN_SAVED_TOKENS else 0

    @cached_property
    def _supervised_columns(self) -> list[int]:
        """The columns in which any row has a supervised token."""
        columns: list[int] = self.supervised_BT.any(dim=0).nonzero()[:, 0].tolist()
        return columns

    def to(self, device: str) -> "Batch":
        """Return the batch with its tensors on a device."""
        return Batch(self.token_ids_BT.to(device), self.supervised_BT.to(device), self.num_tokens)


def row_lengths(rows: PreparedRows) -> NDArray[np.int64]:
    """Return every row's number of tokens, int64[N]."""
    return np.diff(rows.offsets)


def collate(rows: PreparedRows, row_numbers: NDArray[np.int64], pad_id: int) -> Batch:
    """Build the tensors of some rows.

    Args:
        rows: all rows.
        row_numbers: which of them, int64[B].
        pad_id: token that fills the right; never seen by a real position nor supervised.

    Returns:
        The batch on the CPU.
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


def count_supervised(rows: PreparedRows) -> NDArray[np.int64]:
    """Return how many tokens of every row are predicted, int64[N]; a row's first token never is."""
    supervised = rows.supervised.astype(np.int64)
    supervised[rows.offsets[:-1]] = 0
    return np.add.reduceat(supervised, rows.offsets[:-1])
