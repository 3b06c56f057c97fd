"""One connection to a server: a request out, its answer in pieces as they come, parsed by httptools.

A token of a stream passes here on its way to a client, so it may cost no more than reading and parsing it.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import cast

import httptools

from luthier.inference.faults import log_fault

_LOG = logging.getLogger(__name__)

# So much of an answer may wait for its reader before the server has to wait.
_MAX_WAITING_BYTES = 256 * 1024
# And so much of one that comes by another way, which can't wait.
_MAX_FED_BYTES = 16 * 1024 * 1024
# The longest wait for one end of an answer that came by another way when the other one is here.
_REST_SECONDS = 5.0
# After a wait that was too long: what the process could not look at while it stood still may have come.
_LAST_LOOK_SECONDS = 0.05
_LEAST_SECONDS = 0.001
# Names and values of an answer's headers.
_MAX_HEAD_BYTES = 64 * 1024


class BrokenError(Exception):
    """A connection that ended before the answer did, or an answer that is no HTTP.

    Args:
        was_sent: whether the server may have got the whole request; over TLS always.
    """

    def __init__(self, *, was_sent: bool) -> None:
        super().__init__("the connection broke off")
        self.was_sent = was_sent


class _ForeignError(Exception):
    """What comes is no part of the answer."""


class Connection(asyncio.Protocol):
    """A connection that takes one request after the other.

    Args:
        on_lost: called when the connection has gone.
    """

    def __init__(self, on_lost: Callable[["Connection"], None]) -> None:
        self._on_lost = on_lost
        self._transport: asyncio.Transport | None = None
        self._is_drained = True
        self._waiter: asyncio.Future[None] | None = None
        self._wait_seconds = self._waits_until = 0.0
        self._is_last_look = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._pieces: list[bytes] = []
        self._num_waiting = 0
        self._is_paused = False
        self._fault: BrokenError | None = None
        self._has_length = False
        self._has_head = False
        self._num_head_bytes = 0
        # Whether the server goes on listening after the last answer.
        self._is_kept = True
        self.is_over = True
        # Of a body that comes by another way than this connection.
        self._is_fed = self._is_fed_whole = self._is_feed_lost = False
        self._take: Callable[[bytes], bool] | None = None
        # Whether what came is for a reader.
        self._has_news = True
        self.status = 0
        self.headers: dict[str, str] = {}

    @property
    def is_free(self) -> bool:
        """Whether a request may be sent: nothing is under way, and the server goes on listening."""
        is_open = self._transport is not None and not self._transport.is_closing()
        is_at_rest = self.is_over and self._is_drained and not self._is_paused
        return is_at_rest and self._is_kept and is_open

    def send(self, request: bytes) -> None:
        """Send a request; the connection must be free."""
        assert self._transport is not None
        assert self.is_free
        self._parser = httptools.HttpResponseParser(self)
        self._pieces, self._num_waiting = [], 0
        self.is_over = self._has_head = self._is_kept = False
        self._is_fed = self._is_fed_whole = self._is_feed_lost = False
        self._take = None
        self._begin_head()
        self._transport.write(request)

    async def read_head(self, seconds: float) -> None:
        """Wait for `status` and `headers`.

        Raises:
            BrokenError: when the connection ended first.
            TimeoutError: when nothing came for so long; the connection is closed.
        """
        while not self._has_head:
            await self._wait(seconds)

    async def read(self, seconds: float) -> bytes | None:
        """Return what has come of the body, waiting for the first of it.

        Returns:
            Bytes, or None once the answer is over.

        Raises:
            BrokenError: when the connection ended first.
            TimeoutError: when nothing came for so long; the connection is closed.
        """
        while not self._pieces:
            if self.is_over and (self._is_fed_whole or not self._is_fed):
                return None
            # Of the two ends of a fed answer each was sent together with the other.
            is_ending = self.is_over or self._is_fed_whole
            await self._wait(min(seconds, _REST_SECONDS) if is_ending else seconds)
        content = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces, self._num_waiting = [], 0
        self._go_on_reading()
        return content

    def expect_feed(self) -> None:
        """Wait for the body by `feed`; the answer is over when that has ended, and on this connection too."""
        self._is_fed = True
        if self._is_feed_lost:
            self._break_off_fed()

    def pass_to(self, take: Callable[[bytes], bool]) -> None:
        """Offer what comes to somebody while a reader waits for it; what is not taken wakes the reader."""
        self._take = take

    def feed(self, content: bytes) -> None:
        """Take a piece of the body that came by another way; an empty one ends it.

        An answer that nobody reads breaks off when too much of it waits.
        """
        if self._is_feed_lost:
            # What comes after a gap is no part of the answer, its end least of all.
            return
        if not content:
            self._is_fed_whole = True
        elif self._take is not None and self._is_passed_on(content, self._take):
            return
        elif self._num_waiting <= _MAX_FED_BYTES:
            self._pieces.append(content)
            self._num_waiting += len(content)
        else:
            self.break_feed()
        self._wake()

    def _is_passed_on(self, content: bytes, take: Callable[[bytes], bool]) -> bool:
        """Offer a piece to who takes it in its reader's place; whether the reader need not be woken."""
        if self._waiter is None or self._waiter.done() or self._pieces:
            return False
        try:
            if not take(content):
                return False
        except Exception as error:  # noqa: BLE001 - others are fed in the same turn; this one has a gap now
            log_fault(_LOG, "A piece that was passed on", error)
            self._is_feed_lost = True
            self._break_off_fed()
            return True
        # The reader was not woken, and waits for the next piece from now on.
        loop = asyncio.get_running_loop()
        self._waits_until, self._is_last_look = loop.time() + self._wait_seconds, False
        return True

    def break_feed(self) -> None:
        """Take no more of the body that came by another way: it broke off, unless it was whole."""
        if not self._is_fed_whole:
            self._is_feed_lost = True
            if self._is_fed:
                self._break_off_fed()

    def _break_off_fed(self) -> None:
        self._break_off()
        self.close()
        self._wake()

    def close(self) -> None:
        """Leave at once, whatever the server is doing."""
        if not self.is_over:
            # Nor does an answer of unknown length end here.
            self._break_off()
        if self._transport is not None:
            self._transport.abort()

    def _go_on_reading(self) -> None:
        if self._is_paused and self._transport is not None:
            self._is_paused = False
            self._transport.resume_reading()

    async def _wait(self, seconds: float) -> None:
        if self._fault is not None:
            raise self._fault
        loop = asyncio.get_running_loop()
        self._waiter = loop.create_future()
        self._wait_seconds = seconds
        self._waits_until, self._is_last_look = loop.time() + seconds, False
        if self._timer is None or self._timer_at > self._waits_until:
            self._set_timer(loop)
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _set_timer(self, loop: asyncio.AbstractEventLoop) -> None:
        """Let the loop look whether a wait has lasted too long; not one timer a wait, as most are short."""
        self._stop_timer()
        # Not at once, however little is left: that is no timer to every loop.
        self._timer_at = max(self._waits_until, loop.time() + _LEAST_SECONDS)
        self._timer = loop.call_at(self._timer_at, self._time_out, loop)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _time_out(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        # What came in the same turn of the loop came in time.
        if self._waiter is None or self._waiter.done():
            return
        if loop.time() >= self._waits_until and not self._is_last_look:
            self._waits_until, self._is_last_look = loop.time() + _LAST_LOOK_SECONDS, True
        if loop.time() < self._waits_until:
            self._set_timer(loop)
            return
        self._waiter.set_exception(TimeoutError())
        self.close()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _begin_head(self) -> None:
        self.headers = {}
        self._has_length = False
        self._num_head_bytes = 0

    # What the event loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the transport."""
        # uvloop's are no subclass of it.
        self._transport = cast("asyncio.Transport", transport)
        # So that the loop tells when the last byte of a request has left; those of TLS tell it before.
        self._transport.set_write_buffer_limits(0)

    def pause_writing(self) -> None:
        """Note that some of the request has not left."""
        self._is_drained = False

    def resume_writing(self) -> None:
        """Note that all of it has."""
        self._is_drained = True

    def data_received(self, data: bytes) -> None:
        """Parse what came."""
        if self.is_over:
            # Nobody asked for it: the connection can't be trusted.
            self.close()
            return
        self._has_news = True
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            # What follows a whole answer does not belong to it.
            self._is_kept = False
            self.close()
        if self._has_news or self._pieces or self.is_over:
            self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        """End the answer: whole where only the connection's end could tell its length, broken otherwise."""
        ends_here = self._has_head and not self._has_length and exc is None and self._fault is None
        if ends_here:
            self.is_over = True
        elif not self.is_over:
            self._break_off()
        self._transport = None
        self._stop_timer()
        self._on_lost(self)
        self._wake()

    def _break_off(self) -> None:
        if self._fault is None:
            self._fault = BrokenError(was_sent=self._is_drained)

    # What the parser calls.

    def on_message_begin(self) -> None:
        """Refuse what nobody asked for."""
        if self.is_over:
            raise _ForeignError

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header; those that follow a body are left out."""
        if self._has_head:
            return
        self._num_head_bytes += len(name) + len(value)
        if self._num_head_bytes > _MAX_HEAD_BYTES:
            raise _ForeignError
        self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        """Take the status; what is below 200 only announces the answer."""
        self.status = self._parser.get_status_code()
        if self.status < 200:
            self._begin_head()
            return
        self._has_head = True
        encoding = self.headers.get("transfer-encoding", "").lower()
        has_no_body = self.status in (204, 304)
        self._has_length = has_no_body or "chunked" in encoding or "content-length" in self.headers

    def on_body(self, body: bytes) -> None:
        """Keep a piece of the body, unless somebody takes it."""
        if self._fault is not None:
            # What comes after a gap is no part of the answer.
            raise self._fault
        if self._take is not None and self._is_passed_on(body, self._take):
            self._has_news = False
            return
        self._pieces.append(body)
        self._num_waiting += len(body)
        if self._num_waiting > _MAX_WAITING_BYTES and not self._is_paused and self._transport is not None:
            self._is_paused = True
            self._transport.pause_reading()

    def on_message_complete(self) -> None:
        """Note the answer's end, unless there is a gap before it."""
        if self._has_head and self._fault is None:
            self.is_over = True
            self._is_kept = self._has_length and self._parser.should_keep_alive()
            self._go_on_reading()
