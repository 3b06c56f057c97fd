"""The plan of batches: which rows each step trains on, and how a step is split into micro-batches.

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
        return len(self.steps)

    def epoch_of(self, step: int) -> float:
        """Return how many epochs are done after a step."""
        return step / self.steps_per_epoch

    def ends_epoch(self, step: int) -> bool:
        return step % self.steps_per_epoch == 0


def make_plan(lengths: NDArray[np.int64], *, batch_size: int, num_epochs: int, seed: int) -> Plan:
    """Return the rows of every step; every row is in exactly one step of each epoch.

    Args:
        lengths: tokens of every row, int64[N].
        batch_size: rows of a step; the last step of an epoch may have fewer.
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
    """Return the batches of one epoch: shuffle, sort by length within pools, shuffle the batches."""
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
    """Split a step's rows into micro-batches of at most `max_tokens`, padding included, shortest rows first.

    A single longer row is a micro-batch of its own.
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
