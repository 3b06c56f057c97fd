"""The API's end of a channel (luthier/inference/channels.py): streams that come beside their own answers.

A stream that is asked for while no channel is open comes in its own answer, as from a server without any.
"""

import asyncio
import secrets
import time
from collections.abc import Mapping
from types import MappingProxyType

from luthier.core.errors import UnavailableError
from luthier.core.inference import CHANNEL_PATH, HEADER_CHANNEL, HEADER_STREAM
from luthier.inference.backends._connection import Connection
from luthier.inference.backends._http import HttpClient
from luthier.inference.channels import QUIET_SECONDS
from luthier.inference.frames import MAX_NUMBER, FrameReader

# Before a channel is opened again that broke off, and before a server that has none is asked again.
_RETRY_SECONDS, _REFUSED_SECONDS = 1.0, 60.0
# A channel is lost when so many signs of life have not come.
_SILENCE_SECONDS = 3 * QUIET_SECONDS
_NO_HEADERS: Mapping[str, str] = MappingProxyType({})


class ChannelClient:
    """A channel, opened when it is first wanted, and again where it broke off."""

    def __init__(self, client: HttpClient) -> None:
        self._client = client
        self._open: _OpenChannel | None = None
        self._task: asyncio.Task[None] | None = None
        self._retry_at = 0.0
        self._last_number = 0
        self._is_closed = False

    def offer(self) -> "ChannelFeed":
        """Return a feed for one more answer."""
        if self._open is None:
            self._open_soon()
        self._last_number = self._last_number % MAX_NUMBER + 1
        return ChannelFeed(self._open, self._last_number)

    async def aclose(self) -> None:
        """Leave the channel, and open none any more; the answers that come by it break off."""
        self._is_closed = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def _open_soon(self) -> None:
        """Open the channel beside the request that wants it, which does not wait for it."""
        is_free = self._task is None or self._task.done()
        if is_free and not self._is_closed and time.monotonic() >= self._retry_at:
            self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        channel, retry_seconds = _OpenChannel(secrets.token_hex(16)), _RETRY_SECONDS
        headers = {HEADER_CHANNEL: channel.id}
        try:
            answer = await self._client.follow(CHANNEL_PATH, headers, _SILENCE_SECONDS)
            try:
                if answer.status == 404:
                    retry_seconds = _REFUSED_SECONDS
                elif answer.status == 200:
                    self._open = channel
                    answer.pass_to(channel.take)
                    async for piece in answer:
                        channel.take(piece)
            finally:
                await answer.aclose()
        except UnavailableError:
            # Those who wait for something by it are told below; the next one that asks tries again.
            pass
        finally:
            self._open = None
            self._retry_at = time.monotonic() + retry_seconds
            channel.break_off()


class _OpenChannel:
    """A channel from its opening to its end, and who is fed by it."""

    def __init__(self, channel_id: str) -> None:
        self.id = channel_id
        self._reader = FrameReader()
        self._connections: dict[int, Connection] = {}
        self._is_open = True

    def take(self, piece: bytes) -> bool:
        """Hand out what came, always; what is for an answer that nobody reads any more is dropped."""
        for number, content in self._reader.read(piece):
            connection = self._connections.get(number)
            if connection is not None:
                connection.feed(content)
        return True

    def attach(self, number: int, connection: Connection) -> None:
        """Feed a connection from now on, unless nothing will come any more."""
        if self._is_open:
            self._connections[number] = connection

    def feeds(self, number: int) -> bool:
        """Whether what comes under a number has a taker."""
        return number in self._connections

    def detach(self, number: int) -> None:
        """Feed nobody by a number any more."""
        self._connections.pop(number, None)

    def break_off(self) -> None:
        """End with all that is not whole."""
        self._is_open = False
        connections = list(self._connections.values())
        self._connections.clear()
        for connection in connections:
            connection.break_feed()


class ChannelFeed:
    """How one answer may come by a channel.

    Args:
        channel: None where none is open.
    """

    def __init__(self, channel: _OpenChannel | None, number: int) -> None:
        self._channel = channel
        self._number = number

    @property
    def headers(self) -> Mapping[str, str]:
        """What tells the server of it."""
        if self._channel is None:
            return _NO_HEADERS
        return {HEADER_CHANNEL: self._channel.id, HEADER_STREAM: str(self._number)}

    def attach(self, connection: Connection) -> None:
        """Feed a connection from now on."""
        if self._channel is not None:
            self._channel.attach(self._number, connection)

    def accept(self, connection: Connection) -> None:
        """Let the connection wait for the channel, if its head says that the body comes there."""
        channel = self._channel
        if channel is None or connection.headers.get(HEADER_CHANNEL) != channel.id:
            return
        connection.expect_feed()
        if not channel.feeds(self._number):
            # It broke off before the head was read.
            connection.break_feed()

    def detach(self) -> None:
        """Feed nobody any more."""
        if self._channel is not None:
            self._channel.detach(self._number)
