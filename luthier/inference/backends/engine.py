"""The client of Luthier's own inference server, over a Unix socket or TCP with the internal token."""

import httpx2

from luthier.core.errors import UnavailableError
from luthier.core.inference import HEADER_DIGEST, HEADER_TOKEN, ModelTarget
from luthier.core.settings import Settings
from luthier.inference.backends.base import Health, NotAcceptedError, Reply

_CONNECT_SECONDS = 5.0
# Between two pieces of an answer: a first request may wait for a base to load.
_READ_SECONDS = 600.0
_PASSED_HEADERS = frozenset(
    {"content-type", "retry-after", "cache-control", "x-accel-buffering", HEADER_DIGEST}
)
_STATE_PATH = "/internal/state"
# A server takes a request up once it has all of it, which these say that it never had.
_NOT_SENT = (
    httpx2.ConnectError,
    httpx2.ConnectTimeout,
    httpx2.PoolTimeout,
    httpx2.WriteError,
    httpx2.WriteTimeout,
)
# In front of every Unix socket; the name is never looked up.
_LOCAL_ORIGIN = "http://inference"


class EngineBackend:
    """Send requests to the inference server.

    Args:
        url: `unix:///path.sock` or `http://host:port`.
        token: the internal token; sent over TCP only.
    """

    def __init__(self, url: str, token: str = "") -> None:
        is_local = url.startswith("unix://")
        transport = httpx2.AsyncHTTPTransport(
            uds=url.removeprefix("unix://") if is_local else None,
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=32, keepalive_expiry=4.0),
        )
        self._client = httpx2.AsyncClient(
            transport=transport,
            base_url=_LOCAL_ORIGIN if is_local else url,
            headers={} if is_local else {HEADER_TOKEN: token},
            timeout=httpx2.Timeout(_READ_SECONDS, connect=_CONNECT_SECONDS),
        )

    async def complete(self, path: str, body: bytes, target: ModelTarget) -> Reply:
        """Send a request and return as soon as the answer's headers are there.

        Args:
            path: `/v1/chat/completions`, `/v1/completions` or `/v1/responses`.
            body: JSON as the client sent it.
            target: what the public model name resolved to.

        Returns:
            The answer, its body still to be read; closing the body stops the server's work.

        Raises:
            NotAcceptedError: when the server can't be reached, so that another may be asked.
            UnavailableError: when it left before its first byte.
        """
        headers = {"content-type": "application/json"} | target.to_headers()
        request = self._client.build_request("POST", path, content=body, headers=headers)
        try:
            response = await self._client.send(request, stream=True)
        except _NOT_SENT as error:
            raise NotAcceptedError("The model server can't be reached right now; try again.") from error
        except httpx2.TransportError as error:
            raise UnavailableError("The model server left before it had answered; try again.") from error
        passed = {name: value for name, value in response.headers.items() if name in _PASSED_HEADERS}
        return Reply(response.status_code, passed, _Body(response))

    async def health(self) -> Health:
        """Ask the server how it is.

        Returns:
            What it says of itself; it can answer for everything.

        Raises:
            UnavailableError: when it can't be reached.
        """
        try:
            response = await self._client.get(_STATE_PATH, timeout=_CONNECT_SECONDS)
            found = response.raise_for_status().json()
            return Health(
                is_ready=bool(found["ready"]),
                holds=frozenset([*found["bases"], *found["digests"]]),
                num_running=int(found["running"]),
                num_waiting=int(found["waiting"]),
            )
        except (httpx2.HTTPError, ValueError, KeyError, TypeError) as error:
            raise UnavailableError("The model server can't be reached right now; try again.") from error

    async def aclose(self) -> None:
        """Close all connections."""
        await self._client.aclose()


class _Body:
    """The pieces of an answer. A class, since closing a generator that was never begun closes nothing."""

    def __init__(self, response: httpx2.Response) -> None:
        self._response = response
        self._chunks = response.aiter_raw()

    def __aiter__(self) -> "_Body":
        return self

    async def __anext__(self) -> bytes:
        try:
            return await anext(self._chunks)
        except httpx2.TransportError as error:
            await self.aclose()
            raise UnavailableError(
                "The model server broke off in the middle of an answer; try again."
            ) from error
        except BaseException:
            # The end, or a reader that was cancelled: the server sees it and frees the row.
            await self.aclose()
            raise

    async def aclose(self) -> None:
        """Drop the connection unless the answer is whole."""
        await self._response.aclose()


def open_backend(url: str, token: str, settings: Settings | None = None) -> EngineBackend:  # noqa: ARG001
    """Return a client of the server at a URL."""
    return EngineBackend(url, token)
