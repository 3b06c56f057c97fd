"""Clients that leave while something is done for them."""

import asyncio
from types import TracebackType
from typing import Self

from starlette.types import Receive


class UntilLeft:
    """A block that ends, where it waits, once the client of its request has left.

    Args:
        receive: the web server's; the request's body has been read, so that nothing else can come.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._has_left = False

    async def __aenter__(self) -> Self:
        task = asyncio.current_task()
        assert task is not None, "a coroutine runs in a task"
        self._task = task
        self._watch = asyncio.create_task(self._wait())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self._watch.cancel()
        if not self._has_left:
            return False
        is_asked_only_here = self._task.uncancel() == 0
        return is_asked_only_here and isinstance(error, asyncio.CancelledError)

    async def _wait(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._has_left = True
        self._task.cancel()
