"""What a run has cost and how its model changed, over all attempts, as one report."""

import importlib.metadata
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from luthier.core.events import PhaseSeconds, RunReport, StartedFrom
from luthier.training.job import Job
from luthier.training.loop.progress import Progress
from luthier.training.model.device import Machine, peak_memory_bytes
from luthier.training.model.training_model import JobModel

Phase = Literal["load", "train", "evaluate", "save"]
_PACKAGES = ("luthier", "torch", "transformers", "peft")


class Ledger:
    """Sums that go on from those of the attempt before.

    Args:
        clock: seconds from any start, never going back.
    """

    def __init__(
        self, progress: Progress, device: str, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.evaluations = list(progress.evaluations)
        # The untuned base's, where that is not what training starts from.
        self.base_evaluation = progress.base_evaluation
        self.tokens_seen = progress.tokens_seen
        self.supervised_tokens_seen = progress.supervised_tokens_seen
        self._peak_memory_bytes = progress.peak_memory_bytes
        self._seconds = progress.seconds.model_dump()
        self._device = device
        self._clock = clock

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Count the time of a block, failed or not, to a phase."""
        began = self._clock()
        try:
            yield
        finally:
            self._seconds[name] += self._clock() - began

    def add_seconds(self, name: Phase, seconds: float) -> None:
        """Count time that was taken elsewhere to a phase."""
        self._seconds[name] += seconds

    def step_done(self, num_tokens: int, num_supervised: int) -> None:
        """Count one step's tokens; a step that is repeated after a crash is counted once."""
        self.tokens_seen += num_tokens
        self.supervised_tokens_seen += num_supervised

    @property
    def seconds(self) -> PhaseSeconds:
        """Seconds by phase so far."""
        return PhaseSeconds(**self._seconds)

    @property
    def peak_memory_bytes(self) -> int:
        """The most memory that any attempt had in use."""
        return max(self._peak_memory_bytes, peak_memory_bytes(self._device))

    @property
    def tokens_per_second(self) -> float | None:
        """Real tokens trained on per second of the train phase; None before the first step."""
        seconds = self._seconds["train"]
        return self.tokens_seen / seconds if self.tokens_seen and seconds > 0 else None


def code_versions() -> dict[str, str]:
    """Return the versions of what decides a result, Python's included."""
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return versions | {"python": platform.python_version()}


def build_report(
    job: Job,
    trainee: JobModel,
    machine: Machine,
    ledger: Ledger,
    *,
    step: int,
    num_halvings: int,
    result_step: int | None = None,
    stopped_early: str | None = None,
    artifact_bytes: int | None = None,
    artifact_digest: str | None = None,
) -> RunReport:
    """Gather the child's part of a job's report, as it stands after a step.

    Args:
        machine: where it is trained.
        ledger: sums over all attempts.
        result_step: the step whose weights became the model, once that is settled.
        artifact_bytes: size of the newest artifact's weights and configuration.
    """
    spec, base = job.spec, job.origin.base
    return RunReport(
        method=trainee.method.name,
        path=trainee.path,
        device=machine.device,
        precision=machine.precision,
        num_threads=torch.get_num_threads(),
        num_trained_parameters=trainee.attached.num_trained_parameters,
        num_base_parameters=base.num_parameters,
        artifact_bytes=artifact_bytes,
        full_copy_bytes=base.num_parameters * machine.dtype.itemsize,
        evaluations=ledger.evaluations,
        started_from=_started_from(job),
        base_evaluation=ledger.base_evaluation,
        steps_done=step,
        steps_planned=job.plan.num_steps,
        result_step=result_step,
        stopped_early=stopped_early,
        micro_batch_halvings=num_halvings,
        seconds=ledger.seconds,
        tokens_seen=ledger.tokens_seen,
        supervised_tokens_seen=ledger.supervised_tokens_seen,
        tokens_per_second=ledger.tokens_per_second,
        peak_memory_bytes=ledger.peak_memory_bytes,
        base_digest=base.digest,
        data_sha256=job.data_sha256,
        validation_sha256=job.validation_sha256,
        artifact_digest=artifact_digest,
        versions=code_versions(),
        seed=spec.seed,
        spec=spec,
    )


def _started_from(job: Job) -> StartedFrom | None:
    parent = job.spec.parent
    return None if parent is None else StartedFrom(name=parent.name, digest=parent.digest)
