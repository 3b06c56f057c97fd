"""Events of the engine's thread on their way to an event loop, which is woken once for many of them.

A thread that wakes an event loop of its own process loses the interpreter's lock to it, for as long as the
loop has something to do. So the engine's thread holds its mails back until it is about to compute without
the lock, and rings without giving it up.
"""

import asyncio
import ctypes
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

EventT = TypeVar("EventT")

# Rings that are answered at a time.
_MOST_RINGS = 64
# Unlike all that Python offers it keeps the interpreter's lock during the call.
_write = ctypes.PyDLL(None).write
_write.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t)
_write.restype = ctypes.c_ssize_t


class Mail(Generic[EventT]):
    """Events for those who live on one event loop.

    Args:
        loop: the running loop; it is not held, or no loop would ever be let go of.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)
        self._posted: deque[tuple[Callable[[EventT], None], EventT]] = deque()
        self._is_rung = False
        self._heard, self._bell = os.pipe()
        for end in (self._heard, self._bell):
            os.set_blocking(end, False)
            weakref.finalize(loop, os.close, end)
        loop.add_reader(self._heard, self._deliver)

    def post(self, take: Callable[[EventT], None], event: EventT) -> None:
        """Let somebody on the loop have an event; from any thread.

        Args:
            take: called with the event on the loop's thread; it may not raise.

        Raises:
            RuntimeError: when the loop is closed.
        """
        held: set[Mail[Any]] | None = getattr(_HELD, "mails", None)
        if held is not None and self in held:
            # The loop was there when the first event was held back; the next one after these is told if not.
            self._posted.append((take, event))
            return
        loop = self._loop()
        if loop is None or loop.is_closed():
            raise RuntimeError("The event loop is closed.")
        self._posted.append((take, event))
        if held is None:
            self.ring()
        else:
            held.add(self)

    def ring(self) -> None:
        """Let the loop deliver what was posted, unless it was told to already."""
        # The pipe is there as long as the loop is.
        loop = self._loop()
        if loop is not None and not self._is_rung:
            self._is_rung = True
            _write(self._bell, b"!", 1)

    def _deliver(self) -> None:
        os.read(self._heard, _MOST_RINGS)
        # First, so that what is posted from now on rings again: once too often does no harm.
        self._is_rung = False
        while self._posted:
            take, event = self._posted.popleft()
            take(event)


_HELD = threading.local()
_MAILS: "WeakKeyDictionary[asyncio.AbstractEventLoop, Mail[Any]]" = WeakKeyDictionary()


def own_mail() -> "Mail[Any]":
    """Return the mail of the running event loop."""
    loop = asyncio.get_running_loop()
    mail = _MAILS.get(loop)
    if mail is None:
        mail = _MAILS[loop] = Mail(loop)
    return mail


@contextmanager
def holding_back() -> Iterator[None]:
    """Wake no loop for what this thread posts before `hand_over` or the end."""
    outer = getattr(_HELD, "mails", None)
    _HELD.mails = set()
    try:
        yield
    finally:
        hand_over()
        _HELD.mails = outer


def hand_over() -> None:
    """Let the loops deliver what this thread holds back: when it is about to wait, or to compute for long."""
    held: set[Mail[Any]] = getattr(_HELD, "mails", None) or set()
    while held:
        held.pop().ring()
