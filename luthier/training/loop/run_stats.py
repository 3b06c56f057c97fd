"""Progress, pace and totals of a run over all attempts, and its report."""

import importlib.metadata
import platform
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict

from luthier.core.events import Evaluation, Metrics, PhaseSeconds, RunReport, StartedFrom, StepEvent
from luthier.training.job import Job
from luthier.training.model.device import Machine, peak_memory_bytes
from luthier.training.model.training_model import JobModel

_WINDOW_STEPS = 20


class Progress(BaseModel):
    """How far a run is, beside its tensors; all of it outlives the attempt.

    `step` is the last step that is done, `metrics` the scores reported last, `log` the history up to
    them as JSON lines: the next attempt may start in a folder that knows nothing of this one. `untold` is
    the event of an epoch's last step whose validation was cut short. `precision` is the type of the frozen
    weights, which "auto" leaves to the machine of the first attempt. `evaluations` decide when to stop and
    which checkpoint is the result, so they are part of it; `chosen_metrics` are that checkpoint's.
    `max_part_tokens`, set once memory ran out, decides the order of sums.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    step: int = 0
    metrics: Metrics = Metrics()
    untold: StepEvent | None = None
    precision: str | None = None
    log: str = ""
    evaluations: list[Evaluation] = []
    base_evaluation: Evaluation | None = None
    chosen_metrics: Metrics = Metrics()
    micro_batch_halvings: int = 0
    max_part_tokens: int | None = None
    seconds: PhaseSeconds = PhaseSeconds()
    tokens_seen: int = 0
    supervised_tokens_seen: int = 0
    peak_memory_bytes: int = 0


class Pace:
    """Tokens a second over the last steps, and the time left at that pace.

    Args:
        clock: seconds from any start, never going back.
        remaining_tokens: real tokens of all steps still to do.
    """

    def __init__(self, clock: Callable[[], float], remaining_tokens: int) -> None:
        self._clock = clock
        self._remaining_tokens = remaining_tokens
        self._marks: deque[tuple[float, int]] = deque([(clock(), 0)], maxlen=_WINDOW_STEPS + 1)
        self._done_tokens = 0

    def step_done(self, num_tokens: int) -> None:
        """Count one step's real tokens."""
        self._done_tokens += num_tokens
        self._remaining_tokens -= num_tokens
        self._marks.append((self._clock(), self._done_tokens))

    @property
    def tokens_per_second(self) -> float:
        """Real tokens a second over the window."""
        (first_time, first_tokens), (last_time, last_tokens) = self._marks[0], self._marks[-1]
        return (last_tokens - first_tokens) / max(last_time - first_time, 1e-9)

    @property
    def seconds_left(self) -> float:
        """Seconds until the last step at this pace; evaluations are not counted."""
        return max(0, self._remaining_tokens) / max(self.tokens_per_second, 1e-9)


Phase = Literal["load", "train", "evaluate", "save"]
_PACKAGES = ("luthier", "torch", "transformers", "peft")


class RunStats:
    """Sums that continue those of the attempt before.

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
    model: JobModel,
    machine: Machine,
    stats: RunStats,
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
        stats: sums over all attempts.
        result_step: the step whose weights became the model, once that is settled.
        artifact_bytes: size of the newest artifact's weights and configuration.
    """
    spec, base = job.spec, job.origin.base
    return RunReport(
        method=model.method.name,
        path=model.path,
        device=machine.device,
        precision=machine.precision,
        num_threads=torch.get_num_threads(),
        num_trained_parameters=model.attached.num_trained_parameters,
        num_base_parameters=base.num_parameters,
        artifact_bytes=artifact_bytes,
        full_copy_bytes=base.num_parameters * machine.dtype.itemsize,
        evaluations=stats.evaluations,
        started_from=_started_from(job),
        base_evaluation=stats.base_evaluation,
        steps_done=step,
        steps_planned=job.plan.num_steps,
        result_step=result_step,
        stopped_early=stopped_early,
        micro_batch_halvings=num_halvings,
        seconds=stats.seconds,
        tokens_seen=stats.tokens_seen,
        supervised_tokens_seen=stats.supervised_tokens_seen,
        tokens_per_second=stats.tokens_per_second,
        peak_memory_bytes=stats.peak_memory_bytes,
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
