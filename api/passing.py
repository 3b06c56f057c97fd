"""Pieces of a stream on their way to a client, sent in the turn of the event loop in which they come.

To wake a task for a piece takes as long as to send it; so a task is left only what its client does not read
as fast as it comes.
"""

import asyncio
from collections.abc import Awaitable

from starlette.types import Send

from luthier.inference.sending import piece_message, send_now


class PieceSender:
    """Sends the pieces of one answer's body, in order."""

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
        try:
            rest = send_now(self._send, piece)
        except Exception as error:  # noqa: BLE001 - other streams are sent in the same turn; `send` raises it
            self._fault = error
            return False
        if rest is not None:
            self._late = asyncio.create_task(self._finish(rest))
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
            await self._send(piece_message(piece))
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

    async def _finish(self, rest: Awaitable[None]) -> None:
        try:
            await rest
        except Exception as error:  # noqa: BLE001 - whoever sends the next piece is told
            self._fault = error
        finally:
            self._late = None
