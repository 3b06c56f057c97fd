"""The client of Luthier's own inference server, and what other backends' clients are built on.

`InferenceClient` knows one server over httpx2 and what failures of its connections mean, and no models.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from urllib.parse import urlsplit

import httpx2

from luthier.core.errors import LuthierError, UnavailableError
from luthier.core.inference import HEADER_DIGEST, HEADER_TOKEN, HEADER_USAGE, ModelTarget
from luthier.core.settings import Settings
from luthier.serving.base import Health, NotAcceptedError, Reply

CONNECT_SECONDS = 5.0
# Between two pieces of an answer: a first request may wait for a base to load.
_READ_SECONDS = 600.0
# Kept for less time than servers keep an idle connection: uvicorn keeps one for 5 seconds.
_LIMITS = httpx2.Limits(max_connections=None, max_keepalive_connections=32, keepalive_expiry=4.0)
_NO_HEADERS: Mapping[str, str] = MappingProxyType({})
_STATE_PATH = "/internal/state"
_PASSED_HEADERS = frozenset(
    {"content-type", "retry-after", "cache-control", "x-accel-buffering", HEADER_DIGEST, HEADER_USAGE}
)


class EngineBackend:
    """Send requests to the inference server.

    Args:
        url: `unix:///path.sock` or `http://host:port`.
        token: the internal token; sent over TCP only.
    """

    def __init__(self, url: str, token: str = "") -> None:
        self._client = InferenceClient(url, {} if is_local(url) else {HEADER_TOKEN: token})

    async def complete(self, path: str, body: bytes, target: ModelTarget) -> Reply:
        response = await self._client.post(path, body, target.to_headers() | {HEADER_USAGE: "1"})
        status = response.status_code
        passed = {name: value for name, value in response.headers.items() if name in _PASSED_HEADERS}
        if not passed.get("content-type", "").startswith("text/event-stream"):
            return Reply(status, passed, await self._client.read(response))
        return Reply(status, passed, events=self._client.pieces(response), aclose=response.aclose)

    async def health(self) -> Health:
        status, content = await self._client.get(_STATE_PATH)
        if status != 200:
            raise UnavailableError(f"The model server does not return its state: HTTP {status}.")
        try:
            found = json.loads(content)
            return Health(
                is_ready=bool(found["ready"]),
                holds=frozenset([*found["bases"], *found["digests"]]),
                num_running=int(found["running"]),
                num_waiting=int(found["waiting"]),
                room_bytes={kind: int(found["room"][kind]) for kind in found["room"]},
            )
        except (ValueError, KeyError, TypeError) as error:
            raise UnavailableError("The model server's state has an unknown shape.") from error

    async def aclose(self) -> None:
        await self._client.aclose()


def open_backend(url: str, token: str, settings: Settings | None = None) -> EngineBackend:  # noqa: ARG001
    return EngineBackend(url, token)


def is_local(url: str) -> bool:
    """Return whether a URL is that of a Unix socket."""
    return url.startswith("unix://")


class InferenceClient:
    """A client of one server, without a limit of connections; connects with the first request.

    Args:
        url: `unix:///path.sock`, `http://host:port` or `https://host:port`, and a path before all others.
        headers: sent with every request.

    Raises:
        LuthierError: when the URL is none of these.
    """

    def __init__(self, url: str, headers: Mapping[str, str] = _NO_HEADERS) -> None:
        base_url, socket_path = _read_url(url)
        # The certificates of the system take a while to load, and only https asks for them.
        transport = httpx2.AsyncHTTPTransport(
            uds=socket_path, limits=_LIMITS, verify=base_url.startswith("https://")
        )
        self._client = httpx2.AsyncClient(
            base_url=base_url,
            # Pieces of streams are passed on as they come.
            headers={"accept-encoding": "identity", **headers},
            transport=transport,
            timeout=httpx2.Timeout(_READ_SECONDS, connect=CONNECT_SECONDS),
            trust_env=False,
        )
        self._is_closed = False

    async def post(
        self, path: str, content: bytes, headers: Mapping[str, str] = _NO_HEADERS
    ) -> httpx2.Response:
        """Post JSON and return as soon as the answer's headers have come.

        Returns:
            The answer; the caller reads it by one of the methods below, or calls its `aclose`.

        Raises:
            NotAcceptedError: when the server can't be reached, so that another may be asked.
            UnavailableError: when it disconnected before its first byte.
        """
        if self._is_closed:
            raise _stopping()
        more = {"content-type": "application/json", "content-length": str(len(content))}
        request = self._client.build_request(
            "POST", path, content=_once(content), headers={**more, **headers}
        )
        with self._failures("The model server disconnected before it had answered; try again."):
            return await self._client.send(request, stream=True)

    async def read(self, response: httpx2.Response) -> bytes:
        with self._failures(_BROKE_OFF):
            return await response.aread()

    async def pieces(self, response: httpx2.Response) -> AsyncIterator[bytes]:
        """Yield the body of an answer as it comes."""
        with self._failures(_BROKE_OFF):
            async for piece in response.aiter_raw():
                yield piece

    async def events(self, response: httpx2.Response) -> AsyncIterator[httpx2.ServerSentEvent]:
        """Yield the server-sent events of an answer as they come.

        Raises:
            UnavailableError: when the server disconnects before their end, or sends something else.
        """
        with self._failures(_BROKE_OFF):
            async for event in httpx2.EventSource(response):
                yield event

    async def get(self, path: str) -> tuple[int, bytes]:
        """Get something that a server answers at once.

        Raises:
            NotAcceptedError: when it did not come whole within CONNECT_SECONDS; to ask changes nothing.
        """
        if self._is_closed:
            raise _stopping()
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                response = await self._client.get(path)
        except (TimeoutError, httpx2.HTTPError) as error:
            raise _unreachable() from error
        return response.status_code, response.content

    async def aclose(self) -> None:
        """Close all connections; answers that are still read end with an UnavailableError."""
        self._is_closed = True
        await self._client.aclose()

    @contextmanager
    def _failures(self, message: str) -> Iterator[None]:
        """Raise httpx2's failures as ours; `message` is for a connection that broke after it was made."""
        try:
            yield
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            raise _unreachable() from error
        except httpx2.TimeoutException as error:
            raise UnavailableError("The model server did not answer in time; try again.") from error
        except httpx2.HTTPError as error:
            raise (_stopping() if self._is_closed else UnavailableError(message)) from error


_BROKE_OFF = "The model server broke off in the middle of an answer; try again."


async def _once(content: bytes) -> AsyncIterator[bytes]:
    """Yield a body, which is let go of once it is sent: httpx2 keeps the request as long as its answer."""
    yield content


def _read_url(url: str) -> tuple[str, str | None]:
    """Return the base URL, and the path of the socket where it is a Unix socket."""
    if is_local(url):
        # A name that is never looked up stands for a Unix socket.
        return "http://inference", url.removeprefix("unix://")
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        host = None
    if host is None or parts.scheme not in ("http", "https"):
        raise LuthierError(
            f"{url[:80]!r} is no server's URL: unix:///path, http://host:port or https://host:port."
        )
    if parts.query or parts.fragment or "@" in parts.netloc:
        # Not repeated, for it may hold a password.
        raise LuthierError(
            f"The URL of the server at {host} has a user, a query or a fragment, none of which is sent. "
            "Leave it out: LUTHIER_INTERNAL_TOKEN is what the server knows the API by."
        )
    return url, None


def _unreachable() -> NotAcceptedError:
    return NotAcceptedError("The model server can't be reached right now; try again.")


def _stopping() -> UnavailableError:
    return UnavailableError("The service is shutting down; try again.")
