"""Direct preference optimisation: raises the preferred answer's likelihood relative to the other's.

Rafailov et al. 2023, "Direct Preference Optimization" (arXiv:2305.18290), equation 7. The reference is the
model that the job starts from. Its log-likelihoods are computed once, before the first step: that gives what
switching the method off at every step would give, and costs one pass for all epochs. An attempt that resumes
computes them again, from the same weights in the same order.

Legend: P pairs, B rows (2P, the preferred one of each pair first).
"""

from dataclasses import dataclass
from typing import Unpack

import numpy as np
import torch
from numpy.typing import NDArray

from luthier.data.prepare.preference_pairs import split_pairs
from luthier.data.prepare.prepared_rows import PreparedRows
from luthier.modeling.training_protocols import Batch
from luthier.training.model.batches import ScoringOptions, micro_batches
from luthier.training.model.training_model import JobModel


@dataclass(frozen=True)
class PairBatch:
    """Whole pairs, and the reference's log-likelihoods of their rows, float32 [B]."""

    batch: Batch
    reference_B: torch.Tensor


@dataclass(frozen=True)
class PairLoss:
    """Of a batch's pairs: the sum of their losses, differentiable, and their margins, float32 [P]."""

    loss_sum: torch.Tensor
    margins_P: torch.Tensor


class PairSums:
    """Sums over the micro-batches of a step or of an evaluation. Ties count half as right."""

    def __init__(self) -> None:
        self.loss = self.num_right = self.margin = 0.0

    def add(self, found: PairLoss) -> float:
        """Add a micro-batch; return its own loss."""
        margins_P = found.margins_P
        sums = torch.stack([found.loss_sum.detach(), (margins_P.sign() + 1).sum() / 2, margins_P.sum()])
        loss, num_right, margin = sums.tolist()
        self.loss += loss
        self.num_right += num_right
        self.margin += margin
        return float(loss)


@dataclass(frozen=True)
class Preferences:
    """What the objective needs beside the rows: beta, and the reference's log-likelihood of every row.

    `training_N` float32, one a training row; `validation_N` one a validation row, where there are any.
    """

    beta: float
    training_N: NDArray[np.float32]
    validation_N: NDArray[np.float32] | None


def pair_loss(model: JobModel, pairs: PairBatch, beta: float) -> PairLoss:
    """Score some pairs: the sum of -log sigmoid(margin), in float32, and the margins."""
    rewards_B = beta * (model.row_log_likelihoods(pairs.batch) - pairs.reference_B.to(model.device))
    margins_P = rewards_B[0::2] - rewards_B[1::2]
    loss_sum = -torch.nn.functional.logsigmoid(margins_P).sum()
    return PairLoss(loss_sum, margins_P.detach())


@torch.no_grad()
def reference_log_likelihoods(
    model: JobModel, rows: PreparedRows, **options: Unpack[ScoringOptions]
) -> NDArray[np.float32]:
    """Return the log-likelihood of every row's supervised tokens, float32 [N], in evaluation mode."""
    found_N = np.zeros(rows.num_rows, dtype=np.float32)
    with model.evaluation_mode():
        for some, batch in micro_batches(rows, split_pairs, options):
            found_N[some] = model.row_log_likelihoods(batch).cpu().numpy()
    return found_N
