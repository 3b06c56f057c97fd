"""Preferences as prepared rows: a pair is two rows in a row, the preferred answer first.

Row 2p and row 2p + 1 hold the same prompt with the two answers of pair p; supervised are the answers.
"""

import numpy as np
from numpy.typing import NDArray

from luthier.data.prepare.batch_plan import Plan, make_plan, split_micro


def pair_lengths(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the tokens of the longer row of every pair, int64[N / 2]."""
    longer: NDArray[np.int64] = lengths.reshape(-1, 2).max(axis=1)
    return longer


def rows_of_pairs(pairs: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the rows of some pairs, each pair's two beside each other, int64[2 * len(pairs)]."""
    return np.stack([2 * pairs, 2 * pairs + 1], axis=1).reshape(-1)


def make_pair_plan(lengths: NDArray[np.int64], *, batch_size: int, num_epochs: int, seed: int) -> Plan:
    """Return a plan whose steps hold row numbers, two a pair; `lengths` are tokens of every row, int64[N]."""
    plan = make_plan(pair_lengths(lengths), batch_size=batch_size, num_epochs=num_epochs, seed=seed)
    return Plan([rows_of_pairs(pairs) for pairs in plan.steps], plan.steps_per_epoch, plan.num_epochs)


def split_pairs(
    row_numbers: NDArray[np.int64], lengths: NDArray[np.int64], max_tokens: int
) -> list[NDArray[np.int64]]:
    """Split a step's rows as luthier.data.prepare.batch_plan.split_micro does, pairs kept together."""
    pairs = row_numbers[::2] // 2
    return [rows_of_pairs(part) for part in split_micro(pairs, pair_lengths(lengths), max_tokens // 2)]
