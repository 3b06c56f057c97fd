"""Carries events from the engine's thread to event loops. Knows no sequences and no requests."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any

_Delivery = tuple[Callable[[Any], None], Any]


class EventBridge:
    """Buffers events until a flush, which wakes each loop once for all of its events. For one thread.

    A loop that is awake takes the interpreter's lock, so the engine flushes when it is about to compute
    without it, or to wait.
    """

    def __init__(self) -> None:
        self._buffered: dict[asyncio.AbstractEventLoop, list[_Delivery]] = {}

    def add(self, loop: asyncio.AbstractEventLoop, deliver: Callable[[Any], None], event: Any) -> None:
        """Buffer an event; the loop will call `deliver` with it, which may not raise."""
        self._buffered.setdefault(loop, []).append((deliver, event))

    def flush(self) -> None:
        """Hand each loop its buffered events."""
        while self._buffered:
            loop, deliveries = self._buffered.popitem()
            # A closed loop has no request that waits for an event.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(_deliver, deliveries)


def _deliver(deliveries: list[_Delivery]) -> None:
    for deliver, event in deliveries:
        deliver(event)
