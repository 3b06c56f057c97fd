"""A client of one server, over a Unix socket or TCP, and what failures of its connections mean."""

import asyncio
import re
import socket
import ssl
import time
from collections import deque
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple, Protocol
from urllib.parse import urlsplit

from luthier.core.errors import LuthierError, UnavailableError
from luthier.inference.backends._connection import BrokenError, Connection
from luthier.inference.backends.base import NotAcceptedError

CONNECT_SECONDS = 5.0
# Between two pieces of an answer: a first request may wait for a base to load.
_READ_SECONDS = 600.0
# Below what servers keep an idle connection for, uvicorn 5 seconds.
_IDLE_SECONDS = 4.0
_MAX_IDLE = 32
_PATH = re.compile(r"[!-~]*")
_NO_HEADERS: Mapping[str, str] = MappingProxyType({})


def is_local(url: str) -> bool:
    """Whether a URL is that of a Unix socket."""
    return url.startswith("unix://")


class Answer:
    """An answer whose head has come, and an iterator of its body's pieces.

    Whoever has it runs it to its end or calls `aclose`, which tells the server to stop.

    Args:
        connection: the answer's, with its head read.
        release: takes the connection back, whether the answer is whole or not.
    """

    def __init__(self, connection: Connection, release: Callable[[Connection], None]) -> None:
        self.status, self.headers = connection.status, connection.headers
        # The longest silence.
        self.seconds = _READ_SECONDS
        self._connection: Connection | None = connection
        self._release = release

    def __aiter__(self) -> "Answer":
        return self

    async def __anext__(self) -> bytes:
        if self._connection is None:
            raise StopAsyncIteration
        try:
            piece = await self._connection.read(self.seconds)
        except (BrokenError, TimeoutError) as error:
            await self.aclose()
            raise UnavailableError(
                "The model server broke off in the middle of an answer; try again."
            ) from error
        except BaseException:
            # A reader that was cancelled: the server sees it and frees the row.
            await self.aclose()
            raise
        if piece is None:
            await self.aclose()
            raise StopAsyncIteration
        return piece

    def pass_to(self, take: Callable[[bytes], bool]) -> None:
        """Offer pieces to somebody as they come, where they come by a channel."""
        if self._connection is not None:
            self._connection.pass_to(take)

    async def aclose(self) -> None:
        """Drop the connection unless the answer is whole; harmless when it was read or closed before."""
        connection, self._connection = self._connection, None
        if connection is not None:
            self._release(connection)

    async def read(self) -> bytes:
        """Return all of the body that was not read yet."""
        return b"".join([piece async for piece in self])


class Feed(Protocol):
    """Another way by which an answer's body may come than the answer's own connection."""

    def attach(self, connection: Connection) -> None:
        """Feed a connection from now on; its request is about to be sent."""

    def accept(self, connection: Connection) -> None:
        """Let the connection, whose head has come, wait for the feed, if that is how the body comes."""

    def detach(self) -> None:
        """Feed nobody any more."""


class HttpClient:
    """A client of one server, without a limit of connections; nothing is connected before the first request.

    Args:
        url: `unix:///path.sock`, `http://host:port` or `https://host:port`, and a path before all others.
        headers: sent with every request.

    Raises:
        LuthierError: when the URL is none of these.
    """

    def __init__(self, url: str, headers: Mapping[str, str]) -> None:
        self._place = _read_url(url)
        self._tls = ssl.create_default_context() if self._place.is_tls else None
        self._headers = {"host": self._place.authority, **headers}
        self._open: set[Connection] = set()
        self._idle: deque[tuple[Connection, float]] = deque()

    async def post(
        self,
        path: str,
        content: bytes,
        headers: Mapping[str, str] = _NO_HEADERS,
        feed: Feed | None = None,
    ) -> Answer:
        """Post JSON and return as soon as the answer's headers are there.

        Args:
            path: where to.
            feed: another way by which the body may come.

        Returns:
            The answer, its body still to be read.

        Raises:
            NotAcceptedError: when the server can't be reached, so that another may be asked.
            UnavailableError: when it left before its first byte.
        """
        more = {"content-type": "application/json", "content-length": str(len(content)), **headers}
        return await self._send(self._head("POST", path, more) + content, _READ_SECONDS, feed)

    async def follow(self, path: str, headers: Mapping[str, str], seconds: float) -> Answer:
        """Get something that comes over time, and return as soon as its headers are there.

        Args:
            path: where.

        Returns:
            The answer, its body still to be read.

        Raises:
            UnavailableError: when the server can't be reached or leaves before that.
        """
        answer = await self._send(self._head("GET", path, headers), CONNECT_SECONDS)
        answer.seconds = seconds
        return answer

    async def get(self, path: str) -> tuple[int, bytes]:
        """Get something that a server tells at once.

        Args:
            path: where.

        Returns:
            The status and the whole body.

        Raises:
            NotAcceptedError: when it did not come whole within CONNECT_SECONDS; to ask changes nothing.
        """
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                answer = await self._send(self._head("GET", path, {}), CONNECT_SECONDS)
                try:
                    return answer.status, await answer.read()
                finally:
                    await answer.aclose()
        except (TimeoutError, UnavailableError) as error:
            raise _unreachable() from error

    async def aclose(self) -> None:
        """Close all connections."""
        for connection in tuple(self._open):
            connection.close()

    def _head(self, method: str, path: str, headers: Mapping[str, str]) -> bytes:
        first = f"{method} {self._place.prefix}{path} HTTP/1.1\r\n"
        return first.encode("ascii") + _to_lines({**self._headers, **headers}) + b"\r\n"

    async def _send(self, request: bytes, seconds: float, feed: Feed | None = None) -> Answer:
        connection = await self._connect()
        if feed is None:
            await self._read_head(connection, request, seconds)
            return Answer(connection, self._release)
        feed.attach(connection)
        try:
            await self._read_head(connection, request, seconds)
        except BaseException:
            feed.detach()
            raise
        feed.accept(connection)

        def release(connection: Connection) -> None:
            feed.detach()
            self._release(connection)

        return Answer(connection, release)

    async def _read_head(self, connection: Connection, request: bytes, seconds: float) -> None:
        try:
            connection.send(request)
            await connection.read_head(seconds)
        except BrokenError as error:
            if not error.was_sent:
                raise _unreachable() from error
            raise UnavailableError("The model server left before it had answered; try again.") from error
        except TimeoutError as error:
            raise UnavailableError("The model server did not answer in time; try again.") from error
        except BaseException:
            connection.close()
            raise

    async def _connect(self) -> Connection:
        """Return an idle connection, the last used first, or a new one."""
        now = time.monotonic()
        while self._idle:
            connection, since = self._idle.pop()
            if connection.is_free and now - since < _IDLE_SECONDS:
                return connection
            connection.close()
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                connection = await self._open_new()
        except (OSError, TimeoutError, UnicodeError) as error:
            raise _unreachable() from error
        self._open.add(connection)
        return connection

    async def _open_new(self) -> Connection:
        loop, place = asyncio.get_running_loop(), self._place
        if place.socket is not None:
            return (await loop.create_unix_connection(self._make, place.socket))[1]
        found = await loop.getaddrinfo(place.host, place.port, type=socket.SOCK_STREAM)
        fault: OSError = OSError("the name has no address")
        for *_, address in found:
            try:
                # An address that nobody answers at leaves the others their time.
                async with asyncio.timeout(CONNECT_SECONDS / len(found)):
                    _, connection = await loop.create_connection(
                        self._make,
                        *address[:2],
                        ssl=self._tls,
                        server_hostname=place.host if self._tls else None,
                    )
                    return connection
            except OSError as error:
                # A timeout among them.
                fault = error
        raise fault

    def _make(self) -> Connection:
        return Connection(self._open.discard)

    def _release(self, connection: Connection) -> None:
        """Keep a connection for the next request, or leave where the server is not done with this one."""
        if not connection.is_free:
            connection.close()
            return
        if len(self._idle) >= _MAX_IDLE:
            self._idle.popleft()[0].close()
        self._idle.append((connection, time.monotonic()))


class _Place(NamedTuple):
    """Where a server is. `authority` is what requests call it, `prefix` comes before their paths."""

    authority: str
    socket: str | None = None
    host: str = ""
    port: int = 0
    is_tls: bool = False
    prefix: str = ""


def _read_url(url: str) -> _Place:
    if is_local(url):
        # Nobody looks up the name that stands for a Unix socket.
        return _Place("inference", socket=url.removeprefix("unix://"))
    try:
        parts = urlsplit(url)
        host, port, is_tls = parts.hostname, parts.port, parts.scheme == "https"
    except ValueError:
        host = None
    if host is None or parts.scheme not in ("http", "https") or not _PATH.fullmatch(parts.path):
        raise LuthierError(
            f"{url[:80]!r} is no server's URL: unix:///path, http://host:port or https://host:port."
        )
    if parts.query or parts.fragment or "@" in parts.netloc:
        # Not repeated, for it may hold a password.
        raise LuthierError(
            f"The URL of the server at {host} has a user, a query or a fragment, none of which is sent. "
            "Leave it out: LUTHIER_INTERNAL_TOKEN is what the server knows the API by."
        )
    return _Place(
        parts.netloc,
        host=host,
        port=port or (443 if is_tls else 80),
        is_tls=is_tls,
        prefix=parts.path.rstrip("/"),
    )


def _unreachable() -> NotAcceptedError:
    return NotAcceptedError("The model server can't be reached right now; try again.")


def _to_lines(headers: Mapping[str, str]) -> bytes:
    """Return header lines; a value with a line break would smuggle in lines of its own."""
    lines = [f"{name}: {value}\r\n" for name, value in headers.items()]
    if any("\r" in line[:-2] or "\n" in line[:-2] for line in lines):
        raise ValueError("a header's value has a line break")
    return "".join(lines).encode("latin-1")
