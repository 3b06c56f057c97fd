"""Pieces of a stream on their way to a client, sent in the turn of the event loop in which they come.

To wake a task for a piece takes as long as to send it; so a task is left only what its client does not read
as fast as it comes.
"""

import asyncio
import types
from collections.abc import Coroutine, Generator
from typing import Any, cast

from starlette.types import Message, Send


class PieceSender:
    """Sends the pieces of one answer's body, in order.

    Args:
        send: the web server's.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self._late: asyncio.Task[None] | None = None
        self._fault: Exception | None = None
        self._is_sending = False

    def try_send(self, piece: bytes) -> bool:
        """Send a piece now.

        Args:
            piece: not empty.

        Returns:
            False when nothing was sent: pieces before it are still on their way, or could not be sent.
        """
        if self._is_sending or self._late is not None or self._fault is not None:
            return False
        # As a task would run it, up to where it has to wait, which it hardly ever has.
        try:
            sending = self._begin(piece)
            awaited = sending.send(None)
        except StopIteration:
            return True
        except Exception as error:  # noqa: BLE001 - other streams are sent in the same turn; `send` raises it
            self._fault = error
            return False
        self._late = asyncio.create_task(self._finish(sending, awaited))
        return True

    async def send(self, piece: bytes) -> None:
        """Send a piece after all that came before it.

        Args:
            piece: not empty.

        Raises:
            Exception: what one of them could not be sent for.
        """
        self._is_sending = True
        try:
            await self.drain()
            await self._begin(piece)
        finally:
            self._is_sending = False

    async def drain(self) -> None:
        """Wait until all is sent.

        Raises:
            Exception: what a piece could not be sent for.
        """
        if self._late is not None:
            await self._late
        if self._fault is not None:
            raise self._fault

    def close(self) -> None:
        """Wait for nothing any more."""
        if self._late is not None:
            self._late.cancel()

    async def _finish(self, sending: Coroutine[Any, None, None], awaited: Any) -> None:
        try:
            await _go_on(sending, awaited)
        except Exception as error:  # noqa: BLE001 - whoever sends the next piece is told
            self._fault = error
        finally:
            self._late = None

    def _begin(self, piece: bytes) -> Coroutine[Any, None, None]:
        message: Message = {"type": "http.response.body", "body": piece, "more_body": True}
        # Of whatever web server, it is made by `async def`.
        return cast(Coroutine[Any, None, None], self._send(message))


@types.coroutine
def _go_on(sending: Coroutine[Any, None, None], awaited: Any) -> Generator[Any, None, None]:
    """Go on with a coroutine that was run up to where it awaits something."""
    try:
        yield awaited
    except BaseException:
        sending.close()
        raise
    yield from sending
