"""Gradient accumulation over micro-batches, halved after an out-of-memory error, and the update."""

import gc
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from luthier.data.prepare.batch_plan import split_micro
from luthier.data.prepare.preference_pairs import split_pairs
from luthier.modeling.training_protocols import Batch
from luthier.training.job import Job
from luthier.training.loop.run_stats import Progress
from luthier.training.model.batches import collate, count_supervised, row_lengths
from luthier.training.model.device import (
    Machine,
    is_out_of_memory,
    out_of_memory,
    random_states,
    restore_random_states,
)
from luthier.training.model.dpo import PairBatch, PairSums, Preferences, pair_loss
from luthier.training.model.optimizer import SplitAdamW
from luthier.training.model.training_model import JobModel
from luthier.training.process_io import EventWriter

MAX_HALVINGS = 3
# What torch's clipping adds to a norm before it divides by it.
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


def compute_gradients(model: JobModel, micro_batches: Iterable[Batch], *, num_supervised: int) -> StepScores:
    """Replace the gradients by those of the mean loss over the effective batch.

    Every micro-batch's sum is divided by the supervised tokens of all of them, so that how a batch is cut
    changes nothing. Stops at the first micro-batch whose loss is not finite; such scores must not be applied.
    """
    nll_sum, num_right, num_tokens = 0.0, 0, 0
    divisor = max(1, num_supervised)
    model.clear_gradients()
    for batch in micro_batches:
        loss = model.loss(batch)
        value = loss.nll_sum.item()
        nll_sum += value
        num_right += loss.num_right
        num_tokens += batch.num_tokens
        if not math.isfinite(value):
            break
        if loss.num_supervised:
            model.add_gradients(loss.nll_sum / divisor)
    return StepScores(
        loss=nll_sum / divisor,
        accuracy=num_right / divisor,
        grad_norm=gradient_norm(model.gradients),
        num_tokens=num_tokens,
        num_supervised=num_supervised,
    )


def compute_pair_gradients(
    model: JobModel, micro_batches: Iterable[PairBatch], *, beta: float, num_pairs: int, num_supervised: int
) -> StepScores:
    """Do as `compute_gradients` does, with the mean loss over the pairs of the effective batch."""
    sums, num_tokens = PairSums(), 0
    model.clear_gradients()
    for pairs in micro_batches:
        loss = pair_loss(model, pairs, beta)
        num_tokens += pairs.batch.num_tokens
        if not math.isfinite(sums.add(loss)):
            break
        # The loss of rows without a supervised token depends on no parameter.
        if loss.loss_sum.requires_grad:
            model.add_gradients(loss.loss_sum / num_pairs)
    return StepScores(
        loss=sums.loss / num_pairs,
        accuracy=None,
        grad_norm=gradient_norm(model.gradients),
        num_tokens=num_tokens,
        num_supervised=num_supervised,
        reward_accuracy=sums.num_right / num_pairs,
        reward_margin=sums.margin / num_pairs,
    )


def apply_gradients(
    model: JobModel,
    optimizer: torch.optim.Optimizer,
    scores: StepScores,
    *,
    learning_rate: float,
    max_grad_norm: float,
) -> None:
    """Clip the gradients of finite scores to a norm, update the parameters and drop the gradients."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    if isinstance(optimizer, SplitAdamW):
        optimizer.step(gradient_scale=min(1.0, max_grad_norm / (scores.grad_norm + _NORM_EPSILON)))
    else:
        # Otherwise it would multiply by 1, in a pass over all gradients.
        if scores.grad_norm + _NORM_EPSILON > max_grad_norm:
            total_norm = torch.tensor(scores.grad_norm, device=model.device)
            torch.nn.utils.clip_grads_with_norm_(model.parameters, max_grad_norm, total_norm)
        optimizer.step()
    model.clear_gradients()


def gradient_norm(gradients: list[torch.Tensor]) -> float:
    """Return the norm over all gradients, summed in float32 in any type."""
    if not gradients:
        return 0.0
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
    return torch.linalg.vector_norm(torch.stack(norms)).item()


@dataclass
class GradientAccumulator:
    """Cuts the batch of a step into micro-batches that fit into memory, and computes its gradients.

    `max_tokens` are those of a micro-batch, padding included; `progress` counts how often they were halved.
    `preferences` are set when the rows are pairs.
    """

    job: Job
    model: JobModel
    machine: Machine
    writer: EventWriter
    progress: Progress
    pad_id: int
    max_tokens: int
    preferences: Preferences | None = None

    def __post_init__(self) -> None:
        self._lengths = row_lengths(self.job.rows)
        self._num_supervised = count_supervised(self.job.rows)
        # Of the micro-batch that is computed at the moment.
        self._rows: NDArray[np.int64] = np.zeros(0, np.int64)

    def compute(self, step: int) -> StepScores:
        """Compute the gradients of a step, numbered from 1; halve and repeat when memory runs out.

        Raises:
            OutOfMemoryError: when one row alone does not fit, or after three halvings.
        """
        rows = self.job.plan.steps[step - 1]
        random = random_states(self.model.device)
        while True:
            try:
                return self._compute(rows)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                smallest = 1 if self.preferences is None else 2
                if len(self._rows) == smallest or self.progress.micro_batch_halvings == MAX_HALVINGS:
                    raise self._too_large(step) from error
            # Outside the handler: the error's traceback holds the tensors of the micro-batch that failed.
            self._halve(step)
            restore_random_states(random, self.model.device)

    def _compute(self, rows: NDArray[np.int64]) -> StepScores:
        num_supervised = int(self._num_supervised[rows].sum())
        preferences = self.preferences
        if preferences is None:
            batches = map(self._collate, split_micro(rows, self._lengths, self.max_tokens))
            return compute_gradients(self.model, batches, num_supervised=num_supervised)
        return compute_pair_gradients(
            self.model,
            (
                PairBatch(self._collate(some), torch.from_numpy(preferences.training_N[some]))
                for some in split_pairs(rows, self._lengths, self.max_tokens)
            ),
            beta=preferences.beta,
            num_pairs=len(rows) // 2,
            num_supervised=num_supervised,
        )

    def _collate(self, rows: NDArray[np.int64]) -> Batch:
        self._rows = rows
        self.writer.note_progress()
        return collate(self.job.rows, rows, self.pad_id)

    @property
    def _num_tokens(self) -> int:
        """Padded tokens of the micro-batch that is computed."""
        return len(self._rows) * int(self._lengths[self._rows].max())

    def _halve(self, step: int) -> None:
        size = self._num_tokens
        self.max_tokens = self.progress.max_part_tokens = size // 2
        self.progress.micro_batch_halvings += 1
        self.model.clear_gradients()
        gc.collect()
        if self.machine.device == "cuda":
            torch.cuda.empty_cache()
        self.writer.say(
            f"Memory ran out in step {step} with {len(self._rows)} rows ({size} tokens) at a time. From here "
            f"on at most {self.max_tokens} tokens are computed at a time, and batches stay as large as they "
            f"were: halving {self.progress.micro_batch_halvings} of at most {MAX_HALVINGS}.",
            "warn",
        )

    def _too_large(self, step: int) -> Exception:
        rows = "one row" if len(self._rows) == 1 else f"{len(self._rows)} rows"
        return out_of_memory(
            self.job.origin,
            self.machine,
            num_rows=len(self._rows),
            longest=int(self._lengths[self._rows].max()),
            what=f"Step {step}, with {rows} of {self._num_tokens} tokens at a time,",
        )
