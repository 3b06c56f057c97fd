"""How far a run is, how fast it goes and how long it will still take."""

from collections import deque
from collections.abc import Callable

from pydantic import BaseModel, ConfigDict

from luthier.core.events import Evaluation, Metrics, PhaseSeconds, StepEvent

_WINDOW_STEPS = 20


class Progress(BaseModel):
    """How far a run is, beside its tensors; all of it outlives the attempt.

    `step` is the last step that is done, `metrics` the scores that were told last, `log` the history up to
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
