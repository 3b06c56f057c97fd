"""A client of one server, over a Unix socket or TCP, and what failures of its connections mean."""

import asyncio
import ssl
import time
from collections import deque
from collections.abc import Callable, Mapping
from types import MappingProxyType
from urllib.parse import urlsplit

from luthier.core.errors import UnavailableError
from luthier.inference.backends._connection import BrokenError, Connection
from luthier.inference.backends.base import NotAcceptedError

CONNECT_SECONDS = 5.0
# Between two pieces of an answer: a first request may wait for a base to load.
_READ_SECONDS = 600.0
# Below what servers keep an idle connection for, uvicorn 5 seconds.
_IDLE_SECONDS = 4.0
_MAX_IDLE = 32
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
        self._connection: Connection | None = connection
        self._release = release

    def __aiter__(self) -> "Answer":
        return self

    async def __anext__(self) -> bytes:
        if self._connection is None:
            raise StopAsyncIteration
        try:
            piece = await self._connection.read(_READ_SECONDS)
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

    async def aclose(self) -> None:
        """Drop the connection unless the answer is whole; harmless when it was read or closed before."""
        connection, self._connection = self._connection, None
        if connection is not None:
            self._release(connection)

    async def read(self) -> bytes:
        """Return all of the body that was not read yet."""
        return b"".join([piece async for piece in self])


class HttpClient:
    """A client of one server, without a limit of connections; nothing is connected before the first request.

    Args:
        url: `unix:///path.sock`, `http://host:port` or `https://host:port`, and a path before all others.
        headers: sent with every request.
    """

    def __init__(self, url: str, headers: Mapping[str, str]) -> None:
        parts = urlsplit(url)
        self._socket = url.removeprefix("unix://") if is_local(url) else None
        self._host, self._port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._prefix = "" if is_local(url) else parts.path.rstrip("/")
        # Nobody looks up the name that stands for a Unix socket.
        host = "inference" if is_local(url) else parts.netloc.rpartition("@")[2]
        self._lines = _to_lines({"host": host, **headers})
        self._open: set[Connection] = set()
        self._idle: deque[tuple[Connection, float]] = deque()

    async def post(self, path: str, content: bytes, headers: Mapping[str, str] = _NO_HEADERS) -> Answer:
        """Post JSON and return as soon as the answer's headers are there.

        Args:
            path: where to.
            content: the JSON.
            headers: more of them.

        Returns:
            The answer, its body still to be read.

        Raises:
            NotAcceptedError: when the server can't be reached, so that another may be asked.
            UnavailableError: when it left before its first byte.
        """
        more = {"content-type": "application/json", "content-length": str(len(content)), **headers}
        return await self._send(self._head("POST", path, more) + content, _READ_SECONDS)

    async def get(self, path: str) -> tuple[int, bytes]:
        """Get something that a server tells at once.

        Args:
            path: where.

        Returns:
            The status and the whole body.

        Raises:
            UnavailableError: when it did not come within CONNECT_SECONDS.
        """
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                answer = await self._send(self._head("GET", path, {}), CONNECT_SECONDS)
                try:
                    return answer.status, await answer.read()
                finally:
                    await answer.aclose()
        except TimeoutError as error:
            raise NotAcceptedError("The model server can't be reached right now; try again.") from error

    async def aclose(self) -> None:
        """Close all connections."""
        for connection in tuple(self._open):
            connection.close()

    def _head(self, method: str, path: str, headers: Mapping[str, str]) -> bytes:
        first = f"{method} {self._prefix}{path} HTTP/1.1\r\n"
        return first.encode("ascii") + self._lines + _to_lines(headers) + b"\r\n"

    async def _send(self, request: bytes, seconds: float) -> Answer:
        connection = await self._connect()
        try:
            connection.send(request)
            await connection.read_head(seconds)
        except BrokenError as error:
            if not error.was_sent:
                raise NotAcceptedError("The model server can't be reached right now; try again.") from error
            raise UnavailableError("The model server left before it had answered; try again.") from error
        except TimeoutError as error:
            raise UnavailableError("The model server did not answer in time; try again.") from error
        except BaseException:
            connection.close()
            raise
        return Answer(connection, self._release)

    async def _connect(self) -> Connection:
        """Return an idle connection, the last used first, or a new one."""
        now = time.monotonic()
        while self._idle:
            connection, since = self._idle.pop()
            if connection.is_free and now - since < _IDLE_SECONDS:
                return connection
            connection.close()
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                if self._socket is not None:
                    _, connection = await loop.create_unix_connection(self._make, self._socket)
                else:
                    _, connection = await loop.create_connection(
                        self._make, self._host, self._port, ssl=self._tls
                    )
        except (OSError, TimeoutError) as error:
            raise NotAcceptedError("The model server can't be reached right now; try again.") from error
        self._open.add(connection)
        return connection

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


def _to_lines(headers: Mapping[str, str]) -> bytes:
    """Return header lines; a value with a line break would smuggle in lines of its own."""
    lines = [f"{name}: {value}\r\n" for name, value in headers.items()]
    if any("\r" in line[:-2] or "\n" in line[:-2] for line in lines):
        raise ValueError("a header's value has a line break")
    return "".join(lines).encode("latin-1")
