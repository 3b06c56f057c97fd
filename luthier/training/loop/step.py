"""One optimizer step: gradients over all parts of the effective batch, then the update."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from luthier.modeling.protocols import Batch
from luthier.training.model.split_adamw import SplitAdamW
from luthier.training.model.training_model import JobModel

# What clipping adds to a norm before it divides by it, as torch does.
_NORM_EPSILON = 1e-6


@dataclass(frozen=True)
class StepScores:
    """Means over the step's supervised tokens, and the gradient's norm before clipping.

    With preferences the means are over pairs: there is no accuracy by token, but rewards
    (luthier.core.events.Metrics).
    """

    loss: float
    accuracy: float | None
    grad_norm: float
    num_tokens: int
    num_supervised: int
    reward_accuracy: float | None = None
    reward_margin: float | None = None

    @property
    def is_finite(self) -> bool:
        """Whether loss and gradient are numbers that an update can use."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def compute_gradients(trainee: JobModel, parts: Iterable[Batch], *, num_supervised: int) -> StepScores:
    """Fill the gradients of the mean loss over the whole effective batch.

    Every part's sum is divided by the supervised tokens of all parts, so that cutting a batch into
    parts changes nothing. Stops at the first part whose loss is not finite.

    Args:
        trainee: the model; gradients that it had are forgotten.
        num_supervised: supervised tokens in all parts together.

    Returns:
        The scores; not finite ones must not be applied.
    """
    nll_sum, num_right, num_tokens = 0.0, 0, 0
    divisor = max(1, num_supervised)
    trainee.clear_gradients()
    for part in parts:
        loss = trainee.loss(part)
        value = loss.nll_sum.item()
        nll_sum += value
        num_right += loss.num_right
        num_tokens += part.num_tokens
        if not math.isfinite(value):
            break
        if loss.num_supervised:
            trainee.add_gradients(loss.nll_sum / divisor)
    return StepScores(
        loss=nll_sum / divisor,
        accuracy=num_right / divisor,
        grad_norm=gradient_norm(trainee.gradients),
        num_tokens=num_tokens,
        num_supervised=num_supervised,
    )


def apply_gradients(
    trainee: JobModel,
    optimizer: torch.optim.Optimizer,
    scores: StepScores,
    *,
    learning_rate: float,
    max_grad_norm: float,
) -> None:
    """Clip the gradients to a norm, update the parameters and drop the gradients.

    Args:
        scores: what `compute_gradients` returned, finite.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    if isinstance(optimizer, SplitAdamW):
        optimizer.step(gradient_scale=min(1.0, max_grad_norm / (scores.grad_norm + _NORM_EPSILON)))
    else:
        # Else it would multiply by 1, in a pass over all gradients.
        if scores.grad_norm + _NORM_EPSILON > max_grad_norm:
            total_norm = torch.tensor(scores.grad_norm, device=trainee.device)
            torch.nn.utils.clip_grads_with_norm_(trainee.parameters, max_grad_norm, total_norm)
        optimizer.step()
    trainee.clear_gradients()


def gradient_norm(gradients: list[torch.Tensor]) -> float:
    """Return the norm over all gradients, summed in float32 whatever their type."""
    if not gradients:
        return 0.0
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
    return torch.linalg.vector_norm(torch.stack(norms)).item()
