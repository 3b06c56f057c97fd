"""Streams of server-sent events, and work that ends when its client disconnects: for the API and the server.

Knows nothing of models or answers. Never torch.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

STREAM_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}

ResultT = TypeVar("ResultT")


class EventStream(StreamingResponse):
    """Server-sent events.

    Args:
        events: whole events, any number in one piece.
        close: called however the stream ends, also when the client disconnected before it began.
        headers: beside those of every stream.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncIterator[bytes], close: Callable[[], Awaitable[None]], headers: Mapping[str, str]
    ) -> None:
        super().__init__(events, headers=STREAM_HEADERS | dict(headers))
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until they end or the client disconnects."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._close()


async def while_connected(request: Request, work: Awaitable[ResultT]) -> ResultT:
    """Return the result of work that is cancelled when the client disconnects.

    Args:
        request: the client's, its body read.
        work: what to await.

    Raises:
        ClientDisconnect: when the client disconnected first.
    """
    task = asyncio.ensure_future(_as_coroutine(work))
    disconnect = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, disconnect}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        disconnect.cancel()
        task.cancel()


async def _as_coroutine(work: Awaitable[ResultT]) -> ResultT:
    return await work


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
