"""Connections to a server, over a Unix socket or TCP, and what their failures mean."""

from collections.abc import Mapping

import httpx2

from luthier.core.errors import UnavailableError
from luthier.inference.backends.base import NotAcceptedError

CONNECT_SECONDS = 5.0
# Between two pieces of an answer: a first request may wait for a base to load.
_READ_SECONDS = 600.0
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


def is_local(url: str) -> bool:
    """Whether a URL is that of a Unix socket."""
    return url.startswith("unix://")


def open_client(url: str, headers: Mapping[str, str]) -> httpx2.AsyncClient:
    """Open a client of one server; nothing is connected yet.

    Args:
        url: `unix:///path.sock` or `http://host:port`.
        headers: sent with every request.

    Returns:
        The client, without a limit of connections.
    """
    transport = httpx2.AsyncHTTPTransport(
        uds=url.removeprefix("unix://") if is_local(url) else None,
        limits=httpx2.Limits(max_connections=None, max_keepalive_connections=32, keepalive_expiry=4.0),
    )
    return httpx2.AsyncClient(
        transport=transport,
        base_url=_LOCAL_ORIGIN if is_local(url) else url,
        headers=headers,
        timeout=httpx2.Timeout(_READ_SECONDS, connect=CONNECT_SECONDS),
    )


async def post(
    client: httpx2.AsyncClient, path: str, content: bytes, headers: Mapping[str, str] | None = None
) -> httpx2.Response:
    """Post JSON and return as soon as the answer's headers are there.

    Args:
        client: of the server.
        path: where to.
        content: the JSON.
        headers: more of them.

    Returns:
        The answer, its body still to be read.

    Raises:
        NotAcceptedError: when the server can't be reached, so that another may be asked.
        UnavailableError: when it left before its first byte.
    """
    request = client.build_request(
        "POST", path, content=content, headers={"content-type": "application/json", **(headers or {})}
    )
    try:
        return await client.send(request, stream=True)
    except _NOT_SENT as error:
        raise NotAcceptedError("The model server can't be reached right now; try again.") from error
    except httpx2.TransportError as error:
        raise UnavailableError("The model server left before it had answered; try again.") from error


class StreamedBody:
    """The pieces of an answer. A class, since closing a generator that was never begun closes nothing.

    Args:
        response: the answer, of which nothing was read.
    """

    def __init__(self, response: httpx2.Response) -> None:
        self._response = response
        self._chunks = response.aiter_raw()

    def __aiter__(self) -> "StreamedBody":
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
