"""Channels: the streams of one API process in one response, which it opens and keeps open.

A token of a stream of its own costs the event loop of either process a turn, a write or a read of a socket.
By a channel all tokens of a step leave in one write and come in one read. A stream's own response stays open
beside it, without a body: it tells status and headers, and whether its client has left.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Mapping
from typing import NamedTuple

from luthier.core.errors import InvalidRequestError
from luthier.core.inference import HEADER_CHANNEL, HEADER_STREAM
from luthier.inference.frames import MAX_NUMBER, to_frame

_ID = re.compile(r"[0-9a-f]{32}")
_NUMBER = re.compile(r"[0-9]{1,10}")


class Channel:
    """One channel: frames on their way to the API process that reads it."""

    def __init__(self) -> None:
        self._frames: list[bytes] = []
        self._is_written = asyncio.Event()
        self._is_closed = False

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
        self._is_written.set()

    async def pieces(self) -> AsyncIterator[bytes]:
        """Follow what is written.

        Yields:
            All frames that were written since the last ones.
        """
        while self._frames or not self._is_closed:
            await self._is_written.wait()
            self._is_written.clear()
            frames, self._frames = self._frames, []
            if frames:
                yield b"".join(frames)

    def _add(self, frame: bytes) -> None:
        self._frames.append(frame)
        self._is_written.set()


class Place(NamedTuple):
    """Where a stream is sent: a channel, its id, and the stream's number there."""

    channel: Channel
    channel_id: str
    number: int


class Channels:
    """The channels that are open."""

    def __init__(self) -> None:
        self._channels: dict[str, Channel] = {}

    def open(self, headers: Mapping[str, str]) -> tuple[str, Channel]:
        """Open the channel that a request's headers name.

        Args:
            headers: by lower-case name.

        Returns:
            Its id and itself.

        Raises:
            InvalidRequestError: when they name none, or one that is open.
        """
        channel_id = headers.get(HEADER_CHANNEL, "")
        if not _ID.fullmatch(channel_id) or channel_id in self._channels:
            raise InvalidRequestError(f"{HEADER_CHANNEL} must be a new id of 32 hexadecimal digits.")
        channel = self._channels[channel_id] = Channel()
        return channel_id, channel

    def forget(self, channel_id: str) -> None:
        """Send no stream by a channel from now on; nobody reads it."""
        self._channels.pop(channel_id, None)

    def find(self, headers: Mapping[str, str]) -> Place | None:
        """Return where a request's stream may be sent, None for nowhere but its own response."""
        channel_id, number = headers.get(HEADER_CHANNEL, ""), headers.get(HEADER_STREAM, "")
        channel = self._channels.get(channel_id)
        if channel is None or not _NUMBER.fullmatch(number) or int(number) > MAX_NUMBER:
            return None
        return Place(channel, channel_id, int(number))

    def close(self) -> None:
        """End all channels."""
        for channel in self._channels.values():
            channel.close()
