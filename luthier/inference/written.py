"""Streams that are written to as their events arrive, by the event loop's callbacks, not by a task each.

To wake a task, and to go from it through a generator and the frameworks' own coroutines, takes longer than
to send a token. So a piece is sent in the turn of the loop in which it came; what can't be, because the
client does not read, is left to a task.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from luthier.inference.sending import piece_message, send_now
from luthier.inference.wire import SEND, STREAM_HEADERS, while_connected


class ResponseOutlet:
    """The body of a response as something to write to."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._ending = asyncio.Event()
        self._fault: Exception | None = None
        # What came since the client was found not to read, and what waits for it to.
        self._held: list[bytes] = []
        self._late: asyncio.Task[None] | None = None

    def write(self, content: bytes) -> None:
        """Send a piece, at once unless the client is slow to read."""
        if not content or self._ending.is_set():
            return
        if self._late is not None:
            self._held.append(content)
            return
        try:
            rest = send_now(self._send, content)
        except Exception as error:  # noqa: BLE001 - other streams are written to in the same turn
            self._fail(error)
            return
        if rest is not None:
            self._late = asyncio.ensure_future(self._catch_up(rest))

    def end(self) -> None:
        """Nothing: a response's end is sent by whoever made it."""

    @contextmanager
    def ending(self) -> Iterator[asyncio.Event]:
        """Hold what says that there is no more to send."""
        yield self._ending

    async def drain(self) -> None:
        """Wait until all that was written is sent.

        Raises:
            Exception: what a piece could not be sent for.
        """
        if self._late is not None:
            await self._late
        if self._fault is not None:
            raise self._fault

    def close(self) -> None:
        """Send nothing more."""
        self._ending.set()
        if self._late is not None:
            self._late.cancel()

    def _fail(self, error: Exception) -> None:
        self._fault = error
        self._held.clear()
        self._ending.set()

    async def _catch_up(self, rest: Awaitable[None]) -> None:
        try:
            await rest
            while self._held:
                content = b"".join(self._held)
                self._held.clear()
                await self._send(piece_message(content))
        except Exception as error:  # noqa: BLE001 - whoever made the response is told of it
            self._fail(error)
        self._late = None


class WrittenStream(Response):
    """A stream that somebody writes; it gives its rows back however it ends.

    Args:
        write: writes all of it, and returns.
        headers: beside those of every stream.
        close: called at the end.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        write: Callable[[ResponseOutlet], Awaitable[None]],
        headers: dict[str, str],
        close: Callable[[], None],
    ) -> None:
        super().__init__(headers=STREAM_HEADERS | headers)
        del self.headers["content-length"]
        self._write, self._close = write, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream, until it is whole or its client has left."""
        outlet = ResponseOutlet(scope.get(SEND, send))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await while_connected(Request(scope, receive), self._fill(outlet))
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except ClientDisconnect:
            # Nobody reads it any more.
            pass
        finally:
            outlet.close()
            self._close()

    async def _fill(self, outlet: ResponseOutlet) -> None:
        await self._write(outlet)
        await outlet.drain()
