"""An artifact in memory, or on its way there: who holds it, and whether it may leave."""

import asyncio
import time
from dataclasses import dataclass
from typing import NamedTuple

from luthier.inference.models.base_models import ReadyModel, ServedModel
from luthier.inference.models.loading import Kind

# A pin that no request has renewed for so long is let go of: the model may be deleted, or asked elsewhere.
_PIN_SECONDS = 86_400.0


class Held(NamedTuple):
    """Artifacts of one kind: in memory, with their bytes and the most these may be, and over all time."""

    num_models: int
    num_bytes: int
    max_bytes: int
    num_loads: int
    num_evictions: int


@dataclass(eq=False)
class Entry:
    """An artifact in memory, or on its way there.

    `loading` ends with its verification.
    """

    served: ServedModel
    kind: Kind
    num_bytes: int
    loading: "asyncio.Task[ReadyModel]"
    num_holders: int = 0
    # A moment of the monotonic clock.
    pinned_until: float = 0.0
    pinned_by: str = ""

    def pin(self, project_id: str | None) -> None:
        """Let it stay from now on as a project's pinned model, or leave when it is idle."""
        self.pinned_until = 0.0 if project_id is None else time.monotonic() + _PIN_SECONDS
        self.pinned_by = project_id or ""

    @property
    def is_pinned(self) -> bool:
        """Whether it stays when nobody needs it."""
        return time.monotonic() < self.pinned_until

    @property
    def is_idle(self) -> bool:
        """Whether nobody needs it now, and it may leave."""
        return self.num_holders == 0 and not self.is_pinned and self.loading.done()

    @property
    def is_ready(self) -> bool:
        """Whether it is in memory and verified."""
        done = self.loading.done() and not self.loading.cancelled()
        return done and self.loading.exception() is None
