"""Channels: the streams of one API process in one response, which it opens and keeps open.

A token of a stream of its own costs the event loop of either process a turn, a write or a read of a socket.
By a channel all tokens of a step leave in one write and come in one read. A stream's own response stays open
beside it, without a body: it tells status and headers, and whether its client has left.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple

from luthier.core.errors import InvalidRequestError, UnavailableError
from luthier.core.inference import HEADER_CHANNEL, HEADER_STREAM
from luthier.inference.frames import MAX_NUMBER, SIGN_OF_LIFE, to_frame

# So often whoever reads a channel hears that it is there, though nothing is sent.
QUIET_SECONDS = 15.0
_ID = re.compile(r"[0-9a-f]{32}")
_NUMBER = re.compile(r"[0-9]{1,10}")


class Channel:
    """One channel: frames on their way to the API process that reads it."""

    def __init__(self) -> None:
        self._frames: list[bytes] = []
        self._written = asyncio.Event()
        self._is_closed = self._is_lost = False
        # Of the streams that leave here: set when a stream has ended, or nobody reads the channel any more.
        self._ends: set[asyncio.Event] = set()

    def write(self, number: int, content: bytes) -> None:
        """Send a piece of a stream; an empty one is left out, as it would be the stream's end."""
        if content:
            self._add(to_frame(number, content))

    def end(self, number: int) -> None:
        """Send the end of a stream."""
        self._add(to_frame(number, b""))

    def close(self) -> None:
        """End the channel once what was written has left."""
        self._is_closed = True
        self._written.set()

    def lose(self) -> None:
        """End the streams that leave here: nobody reads them any more."""
        self._is_lost = True
        for end in self._ends:
            end.set()

    @contextmanager
    def ending(self) -> Iterator[asyncio.Event]:
        """Hold what says that a stream has no more to send, or nobody to send to."""
        end = asyncio.Event()
        if self._is_lost:
            end.set()
        self._ends.add(end)
        try:
            yield end
        finally:
            self._ends.discard(end)

    async def pieces(self) -> AsyncIterator[bytes]:
        """Follow what is written.

        Yields:
            All frames that were written since the last ones; a sign of life when there are none for long.
        """
        while self._frames or not self._is_closed:
            try:
                async with asyncio.timeout(QUIET_SECONDS):
                    await self._written.wait()
            except TimeoutError:
                yield SIGN_OF_LIFE
                continue
            self._written.clear()
            frames, self._frames = self._frames, []
            if frames:
                yield b"".join(frames)

    def _add(self, frame: bytes) -> None:
        self._frames.append(frame)
        self._written.set()


class Place(NamedTuple):
    """Where a stream is sent: a channel, its id, and the stream's number there."""

    channel: Channel
    channel_id: str
    number: int

    def write(self, content: bytes) -> None:
        """Send a piece of the stream."""
        self.channel.write(self.number, content)

    def end(self) -> None:
        """Send the stream's end."""
        self.channel.end(self.number)

    def ending(self) -> AbstractContextManager[asyncio.Event]:
        """Hold what says that the stream has no more to send, or nobody to send to."""
        return self.channel.ending()


class Channels:
    """The channels that are open."""

    def __init__(self) -> None:
        self._channels: dict[str, Channel] = {}
        self._is_closed = False

    def open(self, headers: Mapping[str, str]) -> tuple[str, Channel]:
        """Open the channel that a request's headers name.

        Raises:
            InvalidRequestError: when they name none, or one that is open.
            UnavailableError: when all were ended.
        """
        if self._is_closed:
            raise UnavailableError("The model server is shutting down; try again.")
        channel_id = headers.get(HEADER_CHANNEL, "")
        if not _ID.fullmatch(channel_id) or channel_id in self._channels:
            raise InvalidRequestError(f"{HEADER_CHANNEL} must be a new id of 32 hexadecimal digits.")
        channel = self._channels[channel_id] = Channel()
        return channel_id, channel

    def forget(self, channel_id: str) -> None:
        """Send no stream by a channel from now on, and end those that are: nobody reads it."""
        channel = self._channels.pop(channel_id, None)
        if channel is not None:
            channel.lose()

    def find(self, headers: Mapping[str, str]) -> Place | None:
        """Return where a request's stream may be sent, None for nowhere but its own response."""
        channel_id, number = headers.get(HEADER_CHANNEL, ""), headers.get(HEADER_STREAM, "")
        channel = None if self._is_closed else self._channels.get(channel_id)
        if channel is None or not _NUMBER.fullmatch(number) or not 0 < int(number) <= MAX_NUMBER:
            return None
        return Place(channel, channel_id, int(number))

    def close(self) -> None:
        """End all channels, and open no more."""
        self._is_closed = True
        for channel in self._channels.values():
            channel.close()
