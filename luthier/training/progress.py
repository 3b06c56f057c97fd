"""How fast a run goes and how long it will still take."""

from collections import deque
from collections.abc import Callable

_WINDOW_STEPS = 20


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
