"""Events of the engine's thread on their way to an event loop, which is woken once for many of them."""

import asyncio
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

EventT = TypeVar("EventT")


class Mail(Generic[EventT]):
    """Events for the queues of one event loop."""

    def __init__(self) -> None:
        self._posted: deque[tuple[asyncio.Queue[EventT], EventT]] = deque()
        self._is_called = False

    def post(self, loop: asyncio.AbstractEventLoop, queue: "asyncio.Queue[EventT]", event: EventT) -> None:
        """Put an event into a queue of the loop; from any thread.

        Args:
            loop: the mail's own.
            queue: one of that loop.
            event: what to put.

        Raises:
            RuntimeError: when the loop is closed.
        """
        if loop.is_closed():
            raise RuntimeError("The event loop is closed.")
        self._posted.append((queue, event))
        held: dict[Mail[EventT], asyncio.AbstractEventLoop] | None = getattr(_HELD, "mails", None)
        if held is not None:
            held[self] = loop
        else:
            self.wake(loop)

    def wake(self, loop: asyncio.AbstractEventLoop) -> None:
        """Let the loop deliver what was posted, unless it was told to already."""
        if not self._is_called:
            self._is_called = True
            loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        # First, so that what is posted from now on calls again: once too often does no harm.
        self._is_called = False
        while self._posted:
            queue, event = self._posted.popleft()
            queue.put_nowait(event)


_HELD = threading.local()
# It must not hold its loop, or no loop would ever be let go of.
_MAILS: "WeakKeyDictionary[asyncio.AbstractEventLoop, Mail[Any]]" = WeakKeyDictionary()


def mail_of(loop: asyncio.AbstractEventLoop) -> "Mail[Any]":
    """Return the mail of a loop."""
    return _MAILS.setdefault(loop, Mail())


@contextmanager
def posted_together() -> Iterator[None]:
    """Wake no loop for what this thread posts before all of it is there.

    A loop that wakes at the first of many events takes the interpreter from the thread that posts the others.

    Yields:
        Nothing.
    """
    held: dict[Mail[Any], asyncio.AbstractEventLoop] = {}
    outer = getattr(_HELD, "mails", None)
    _HELD.mails = held
    try:
        yield
    finally:
        _HELD.mails = outer
        for mail, loop in held.items():
            try:
                mail.wake(loop)
            except RuntimeError:
                # The loop was closed meanwhile: the process is ending and nobody waits for these.
                continue
