"""The gradients of one step in parts that fit into memory; in smaller ones once it has run out."""

import gc
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from luthier.data.prepare.batch_plan import split_micro
from luthier.data.prepare.preference_pairs import split_pairs
from luthier.modeling.protocols import Batch
from luthier.training.emit import EventWriter
from luthier.training.job import Job
from luthier.training.loop.step import StepScores, compute_gradients
from luthier.training.model.batches import collate, count_supervised, row_lengths
from luthier.training.model.device import Machine
from luthier.training.model.dpo import PairBatch, Preferences, compute_pair_gradients
from luthier.training.model.memory import is_out_of_memory, out_of_memory
from luthier.training.model.training_model import JobModel

MAX_HALVINGS = 3


class MicroBatches:
    """Cuts steps into parts and computes their gradients, whose sum does not depend on the cut.

    Args:
        machine: where it runs.
        writer: told when parts become smaller.
        pad_id: token on the right of shorter rows.
        num_halvings: how often it was halved already, in all attempts.
        preferences: set when the rows are pairs.
    """

    def __init__(
        self,
        job: Job,
        trainee: JobModel,
        machine: Machine,
        writer: EventWriter,
        *,
        pad_id: int,
        max_tokens: int,
        num_halvings: int,
        preferences: Preferences | None = None,
    ) -> None:
        self.max_tokens = max_tokens
        self.num_halvings = num_halvings
        self._job = job
        self._trainee = trainee
        self._machine = machine
        self._writer = writer
        self._pad_id = pad_id
        self._preferences = preferences
        self._lengths = row_lengths(job.rows)
        self._num_supervised = count_supervised(job.rows)
        # The part that is computed at the moment.
        self._rows: NDArray[np.int64] = np.zeros(0, np.int64)

    def compute(self, step: int) -> StepScores:
        """Fill the gradients of a step; halve its parts and begin it again when memory runs out.

        Args:
            step: 1 for the first.

        Returns:
            The scores of the whole step.

        Raises:
            OutOfMemoryError: when one row alone does not fit, or the parts were halved three times before.
        """
        rows = self._job.plan.steps[step - 1]
        random = _random_states(self._trainee.device)
        while True:
            try:
                return self._compute(rows)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                smallest = 1 if self._preferences is None else 2
                if len(self._rows) == smallest or self.num_halvings == MAX_HALVINGS:
                    raise self._give_up(step) from error
            # Outside the handler: the error's traceback holds the tensors of the part that failed.
            self._halve(step)
            _restore_random_states(random, self._trainee.device)

    def _compute(self, rows: NDArray[np.int64]) -> StepScores:
        num_supervised = int(self._num_supervised[rows].sum())
        if self._preferences is None:
            return compute_gradients(self._trainee, self._parts(rows), num_supervised=num_supervised)
        return compute_pair_gradients(
            self._trainee,
            self._pairs(rows, self._preferences),
            beta=self._preferences.beta,
            num_pairs=len(rows) // 2,
            num_supervised=num_supervised,
        )

    def _pairs(self, rows: NDArray[np.int64], preferences: Preferences) -> Iterator[PairBatch]:
        for part in split_pairs(rows, self._lengths, self.max_tokens):
            self._rows = part
            self._writer.note_progress()
            batch = collate(self._job.rows, part, self._pad_id)
            yield PairBatch(batch, preferences.reference_of(part))

    def _parts(self, rows: NDArray[np.int64]) -> Iterator[Batch]:
        for part in split_micro(rows, self._lengths, self.max_tokens):
            self._rows = part
            self._writer.note_progress()
            yield collate(self._job.rows, part, self._pad_id)

    @property
    def _num_tokens(self) -> int:
        """Padded tokens of the part that is computed."""
        return len(self._rows) * int(self._lengths[self._rows].max())

    def _halve(self, step: int) -> None:
        size = self._num_tokens
        self.max_tokens = size // 2
        self.num_halvings += 1
        self._trainee.clear_gradients()
        gc.collect()
        if self._machine.device == "cuda":
            torch.cuda.empty_cache()
        self._writer.say(
            f"Memory ran out in step {step} with {len(self._rows)} rows ({size} tokens) at a time. From here "
            f"on at most {self.max_tokens} tokens are computed at a time, and batches stay as large as they "
            f"were: halving {self.num_halvings} of at most {MAX_HALVINGS}.",
            "warn",
        )

    def _give_up(self, step: int) -> Exception:
        rows = "one row" if len(self._rows) == 1 else f"{len(self._rows)} rows"
        return out_of_memory(
            self._job.origin,
            self._machine,
            num_rows=len(self._rows),
            longest=int(self._lengths[self._rows].max()),
            what=f"Step {step}, with {rows} of {self._num_tokens} tokens at a time,",
        )


def _random_states(device: str) -> list[torch.Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state()] if device.startswith("cuda") else states


def _restore_random_states(states: list[torch.Tensor], device: str) -> None:
    torch.set_rng_state(states[0])
    if device.startswith("cuda"):
        torch.cuda.set_rng_state(states[1])
