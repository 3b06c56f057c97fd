"""The HTTP protocol of our servers: uvicorn's on httptools, with limits on headers, silence and connections.

It bounds what a proxy usually bounds, so that a server is safe without one. No routes and no keys here.
"""

import asyncio
import json
import resource
from collections.abc import Callable
from typing import ClassVar

from starlette.responses import JSONResponse
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from luthier.core.errors import HeadersTooLargeError, UnavailableError
from luthier.core.settings import Settings

# Connections beyond the limit that are answered 503; any further one is closed at once.
_NUM_REFUSED = 256
_MAX_OPEN_FILES = 65536
# Checks of a body within its timeout. A large body with fewer new bytes than the minimum counts as silent:
# a trickling file would occupy its check for days.
_NUM_LOOKS = 4
_LARGE_BODY_BYTES = 256 * 1024
_MIN_BYTES_A_LOOK = 1024

_busy = UnavailableError("Too many connections are open; try again.")
_BUSY_RESPONSE = JSONResponse(_busy.to_body(), _busy.http_status, {"retry-after": "1", "connection": "close"})


def limited_protocol(settings: Settings) -> type[HttpToolsProtocol]:
    """Return the protocol class for uvicorn's `http`, with the limits that the settings name."""
    return type("LimitedHttpProtocol", (_LimitedHttpProtocol,), {"settings": settings, "idle": {}})


def raise_open_file_limit() -> None:
    """Raise this process's limit of open files as far as the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _MAX_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class _LimitedHttpProtocol(HttpToolsProtocol):
    """One connection.

    Headers must be complete within the timeout from the connection, or from the first byte of a later
    request. A body must not be silent for its timeout while the server reads it, and must end within that
    time once the request has been answered.
    """

    settings: ClassVar[Settings]
    # Connections without a request, the longest idle first: they are closed where too many are open.
    idle: ClassVar[dict["_LimitedHttpProtocol", None]]

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the timeout of the headers."""
        super().connection_made(transport)
        self._num_header_bytes = 0
        self._awaits_headers = True
        self._num_body_bytes = self._num_seen_bytes = 0
        self._num_silent_looks = 0
        self._timer: asyncio.TimerHandle | None = None
        self.idle[self] = None
        if len(self.connections) > self.settings.max_connections:
            self._close_longest_idle()
        if len(self.connections) > self.settings.max_connections + _NUM_REFUSED:
            transport.abort()
        else:
            self._arm(self.settings.header_timeout_seconds, transport.close)

    def _close_longest_idle(self) -> None:
        longest = next(iter(self.idle))
        if longest is not self:
            del self.idle[longest]
            self.connections.discard(longest)
            longest.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        self.idle.pop(self, None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse the bytes; of headers no more than the limit."""
        while data and not self.transport.is_closing():
            piece, data = data, b""
            if self._awaits_headers:
                room = self.settings.max_header_bytes - self._num_header_bytes
                if room == 0:
                    self._refuse_headers()
                    return
                piece, data = piece[:room], piece[room:]
                self._num_header_bytes += len(piece)
            self._num_body_bytes += len(piece)
            super().data_received(piece)
        if self._timer is None and not self.transport.is_closing():
            if not self._awaits_headers:
                self._arm(self.settings.body_timeout_seconds / _NUM_LOOKS, self._look_at_body)
            elif self._num_header_bytes:
                self._arm(self.settings.header_timeout_seconds, self.transport.close)

    def on_headers_complete(self) -> None:
        """Start the request, or answer it 503 where too many connections are open."""
        self._disarm()
        self.idle.pop(self, None)
        self._awaits_headers, self._num_header_bytes, self._num_silent_looks = False, 0, 0
        self._num_body_bytes = self._num_seen_bytes = 0
        is_busy = len(self.connections) > self.settings.max_connections
        self.app = _BUSY_RESPONSE if is_busy else self.config.loaded_app
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Wait for the next request, without a timeout until its first byte."""
        self._disarm()
        self._awaits_headers = True
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle.response_complete and not self.transport.is_closing():
            self.idle[self] = None

    def _look_at_body(self) -> None:
        cycle = self.cycle
        # The server reads no more for now, or the client waits for the server's 100.
        is_held_up = self.flow.read_paused or cycle.waiting_for_100_continue
        num_new = self._num_body_bytes - self._num_seen_bytes
        min_new = _MIN_BYTES_A_LOOK if self._num_seen_bytes > _LARGE_BODY_BYTES else 1
        is_alive = (num_new >= min_new or is_held_up) and not cycle.response_complete
        self._num_silent_looks = 0 if is_alive else self._num_silent_looks + 1
        self._num_seen_bytes = self._num_body_bytes
        if self._num_silent_looks < _NUM_LOOKS:
            self._arm(self.settings.body_timeout_seconds / _NUM_LOOKS, self._look_at_body)
        else:
            self.transport.close()

    def _refuse_headers(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            limit = self.settings.max_header_bytes
            error = HeadersTooLargeError(
                f"The headers are larger than {limit} bytes; send fewer or shorter ones."
            )
            body = json.dumps(error.to_body()).encode()
            head = (
                f"HTTP/1.1 {error.http_status} Request Header Fields Too Large\r\n"
                f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
        self.transport.close()

    def _arm(self, seconds: float, act: Callable[[], None]) -> None:
        self._disarm()
        self._timer = self.loop.call_later(seconds, act)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
