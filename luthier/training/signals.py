"""TERM means: finish the step, write a save point, say `stopped`, exit 0."""

import signal
from types import FrameType


class StopRequest:
    """Remembers that TERM came; the loop asks between steps.

    `leave_at_once` is true while there is nothing to save (a process that waits for runs).
    """

    def __init__(self) -> None:
        self.is_set = False
        self.leave_at_once = False

    def install(self) -> "StopRequest":
        """Take over TERM in this process; must run on the main thread, before slow imports."""
        signal.signal(signal.SIGTERM, self._on_term)
        return self

    def _on_term(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self.is_set = True
        if self.leave_at_once:
            raise SystemExit(0)
