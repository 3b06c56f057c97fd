"""Which rows each step trains on, settled before the first step, and how a step is cut into parts.

The order is a function of (lengths, batch size, seed, epoch) and nothing else, so a position is an
integer. Rows of like length share a batch, which keeps padding small.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Batches whose rows are sorted together: many enough to cut padding, few enough to keep the order random.
_POOL_BATCHES = 16


@dataclass(frozen=True)
class Plan:
    """All steps of a run: `steps[i]` holds the row numbers (int64) of step i + 1."""

    steps: list[NDArray[np.int64]]
    steps_per_epoch: int
    num_epochs: int

    @property
    def num_steps(self) -> int:
        """Steps in all epochs together."""
        return len(self.steps)

    def epoch_of(self, step: int) -> float:
        """Return how many epochs are done after a step."""
        return step / self.steps_per_epoch

    def ends_epoch(self, step: int) -> bool:
        """Whether a step is the last of its epoch."""
        return step % self.steps_per_epoch == 0


def make_plan(lengths: NDArray[np.int64], *, batch_size: int, num_epochs: int, seed: int) -> Plan:
    """Settle the rows of every step.

    Args:
        lengths: tokens of every row, int64[N].
        batch_size: rows of a step; the last step of an epoch may have fewer.
        num_epochs: passes over the rows; each has an order of its own.

    Returns:
        The plan; every row is in exactly one step of each epoch.
    """
    epochs = [order_epoch(lengths, batch_size, seed, epoch) for epoch in range(num_epochs)]
    return Plan(
        steps=[rows for epoch in epochs for rows in epoch],
        steps_per_epoch=len(epochs[0]),
        num_epochs=num_epochs,
    )


def order_epoch(
    lengths: NDArray[np.int64], batch_size: int, seed: int, epoch: int
) -> list[NDArray[np.int64]]:
    """Deal the rows of one epoch into batches: shuffle, sort by length within pools, shuffle the batches."""
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(lengths))
    pool_size = batch_size * _POOL_BATCHES
    batches: list[NDArray[np.int64]] = []
    for start in range(0, len(order), pool_size):
        pool = order[start : start + pool_size]
        pool = pool[np.argsort(lengths[pool], kind="stable")]
        batches += [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
    return [batches[i] for i in generator.permutation(len(batches))]


def split_micro(
    row_numbers: NDArray[np.int64], lengths: NDArray[np.int64], max_tokens: int
) -> list[NDArray[np.int64]]:
    """Split a step's rows so that no part has more than `max_tokens` with its padding.

    Args:
        lengths: tokens of every row.
        max_tokens: bound on rows times longest; a single longer row is a part of its own.

    Returns:
        The parts, shortest rows first, each row in exactly one.
    """
    ordered = row_numbers[np.argsort(lengths[row_numbers], kind="stable")]
    parts: list[NDArray[np.int64]] = []
    start = 0
    for end in range(1, len(ordered) + 1):
        is_last = end == len(ordered)
        if is_last or (end + 1 - start) * int(lengths[ordered[end]]) > max_tokens:
            parts.append(ordered[start:end])
            start = end
    return parts
