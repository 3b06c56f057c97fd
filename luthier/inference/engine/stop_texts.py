"""Stop texts, which may cross token borders and are never returned. Text only."""

from collections.abc import Sequence


class StopMatcher:
    """Let text through until one of the stop texts appears.

    Text that could be the beginning of a stop text is held back until it is decided.

    Args:
        stops: the stop texts, none empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self._num_released = 0
        self.is_hit = False

    def push(self, text: str) -> str:
        """Add text and return what is certain to be part of the answer."""
        buffer = self._held + text
        positions = [at for at in (buffer.find(stop) for stop in self._stops) if at >= 0]
        if positions:
            self.is_hit = True
            return self._release(buffer, min(positions), keep=False)
        return self._release(buffer, len(buffer) - self._num_undecided(buffer), keep=True)

    def flush(self) -> str:
        """Return what was held back; to be called when no more text can come."""
        return self._release(self._held, len(self._held), keep=False)

    @property
    def num_released(self) -> int:
        """Characters let through so far."""
        return self._num_released

    def _release(self, buffer: str, length: int, *, keep: bool) -> str:
        self._held = buffer[length:] if keep else ""
        self._num_released += length
        return buffer[:length]

    def _num_undecided(self, buffer: str) -> int:
        longest = min(len(buffer), max((len(stop) for stop in self._stops), default=1) - 1)
        for length in range(longest, 0, -1):
            tail = buffer[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0
