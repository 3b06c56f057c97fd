"""Keeps what a job's live events say while somebody else shows them. Measures on the client's clock."""

from collections.abc import Iterator
from time import monotonic
from typing import Any

from luthier.client import LuthierClient


class EventRecorder(LuthierClient):
    """A client that remembers when events came and what they measured.

    `first_step_at` and `ended_at` are readings of the monotonic clock, in seconds.
    """

    first_step_at: float = 0.0
    ended_at: float = 0.0
    base_valid_loss: float | None = None
    _last_step_at: float = 0.0
    _num_tokens: int = 0

    def follow_events(self, job_id: str, *, last_event_id: str = "") -> Iterator[dict[str, Any]]:
        """Yield a job's events as LuthierClient does, and remember them."""
        for event in super().follow_events(job_id, last_event_id=last_event_id):
            self._remember(event, monotonic())
            yield event

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all steps but the first over the time between the first step's event and the last's.

        Validation in between counts as time, so this is what a user gets, not the steps' own peak.
        """
        seconds = self._last_step_at - self.first_step_at
        return self._num_tokens / seconds if seconds > 0 else 0.0

    def _remember(self, event: dict[str, Any], now: float) -> None:
        self.ended_at = now
        data = event.get("data") or {}
        if "base" in data:
            self.base_valid_loss = data["base"].get("valid_loss")
        if event.get("type") != "metrics":
            return
        if self.first_step_at:
            self._num_tokens += data["num_tokens"]
        else:
            self.first_step_at = now
        self._last_step_at = now
