"""Progress and totals of a run over all attempts, and the pace of this one."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from pydantic import BaseModel, ConfigDict

from luthier.core.events import Evaluation, Metrics, PhaseSeconds, StepEvent
from luthier.training.model.device import peak_memory_bytes

_WINDOW_STEPS = 20

Phase = Literal["load", "train", "evaluate", "save"]


class Progress(BaseModel):
    """How far a run is, beside its tensors; all of it outlives the attempt, in every save point.

    `step` is the last step that is done, `metrics` the scores reported last, `log` the history up to
    them as JSON lines: the next attempt may start in a folder that knows nothing of this one. `untold` is
    the event of an epoch's last step whose validation was cut short. `precision` is the type of the frozen
    weights, which "auto" leaves to the machine of the first attempt. `evaluations` decide when to stop and
    which checkpoint is the result, so they are part of it; `chosen_metrics` are that checkpoint's.
    `base_evaluation` is the untuned base's, where that is not what training starts from.
    `max_part_tokens`, set once memory ran out, decides the order of sums.
    """

    model_config = ConfigDict(extra="forbid")

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

    @contextmanager
    def phase(self, name: Phase, clock: Callable[[], float] = time.monotonic) -> Iterator[None]:
        """Count the time of a block, failed or not, to a phase."""
        began = clock()
        try:
            yield
        finally:
            self.add_seconds(name, clock() - began)

    def add_seconds(self, name: Phase, seconds: float) -> None:
        """Count time that was taken elsewhere to a phase."""
        self.seconds = self.seconds.model_copy(update={name: getattr(self.seconds, name) + seconds})

    def note_memory(self, device: str) -> None:
        """Take this process's peak of memory into the largest of all attempts."""
        self.peak_memory_bytes = max(self.peak_memory_bytes, peak_memory_bytes(device))

    @property
    def tokens_per_second(self) -> float | None:
        """Real tokens trained on per second of the train phase; None before the first step."""
        seconds = self.seconds.train
        return self.tokens_seen / seconds if self.tokens_seen and seconds > 0 else None


class Pace:
    """Real tokens a second over the last steps, and the time left at that pace."""

    def __init__(self, clock: Callable[[], float], remaining_tokens: int) -> None:
        self._clock = clock
        self._remaining_tokens = remaining_tokens
        self._marks: deque[tuple[float, int]] = deque([(clock(), 0)], maxlen=_WINDOW_STEPS + 1)
        self._done_tokens = 0

    def step_done(self, num_tokens: int) -> None:
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
