"""Scoring rows without training on them."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from luthier.data.prepared import PreparedRows
from luthier.training.batches import collate, row_lengths, split_micro
from luthier.training.trainee import Trainee


class StoppedError(Exception):
    """TERM came in the middle of something that can be done again after a resume."""


@dataclass(frozen=True)
class Scores:
    """Mean negative log-likelihood in nats and share of right predictions, per supervised token."""

    loss: float
    accuracy: float


@torch.no_grad()
def evaluate(
    trainee: Trainee,
    rows: PreparedRows,
    *,
    max_tokens: int,
    pad_id: int,
    should_stop: Callable[[], bool],
) -> Scores:
    """Score all rows.

    Args:
        trainee: the model; in evaluation mode meanwhile.
        rows: validation rows, with at least one supervised token in all.
        max_tokens: bound on a part with its padding.
        pad_id: token on the right of shorter rows.
        should_stop: asked between parts.

    Returns:
        Means over all supervised tokens.

    Raises:
        StoppedError: when `should_stop` said so.
    """
    model = trainee.attached.model
    was_training = model.training
    model.eval()
    nll_sum, num_right, num_supervised = 0.0, 0, 0
    try:
        for part in split_micro(np.arange(rows.num_rows), row_lengths(rows), max_tokens):
            if should_stop():
                raise StoppedError
            loss = trainee.loss(collate(rows, part, pad_id))
            nll_sum += loss.nll_sum.item()
            num_right += loss.num_right
            num_supervised += loss.num_supervised
    finally:
        model.train(was_training)
    return Scores(loss=nll_sum / max(1, num_supervised), accuracy=num_right / max(1, num_supervised))
