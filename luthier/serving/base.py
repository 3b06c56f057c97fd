"""What a backend is: a client of some inference server that speaks OpenAI's protocol. Never torch."""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple, Protocol

from luthier.core.errors import UnavailableError
from luthier.core.inference import ModelTarget


class NotAcceptedError(UnavailableError):
    """A server that never got the request, so that another may be asked in its place."""

    # One that died is back after some five; two repetitions of an SDK's should last as long.
    retry_after_seconds = 5


class Health(NamedTuple):
    """How a server is.

    `holds` are the digests of the artifacts in its memory and the ids of its bases. `serves` are the bases'
    ids and whole models' digests that it can ever answer for, None where that is everything. `room_bytes` is
    the memory for tuned models by kind, `packed` or `whole`, where the server limits it in bytes.
    """

    is_ready: bool
    holds: frozenset[str]
    num_running: int
    num_waiting: int
    serves: frozenset[str] | None = None
    room_bytes: Mapping[str, int] = MappingProxyType({})


async def _nothing_to_close() -> None:
    """Close what was read already."""


class Reply(NamedTuple):
    """An upstream's answer: its status, the headers worth passing on, and its body.

    The header HEADER_USAGE says what it used, of a stream its prompts, which then ends with an event of it.
    `content` is the whole body, except of a stream of server-sent events, whose pieces `events` yields as
    they come. Who takes a stream calls `aclose` in every case; before the end it makes the upstream stop.
    """

    status: int
    headers: Mapping[str, str]
    content: bytes = b""
    events: AsyncIterator[bytes] | None = None
    aclose: Callable[[], Awaitable[None]] = _nothing_to_close


class Backend(Protocol):
    """A client of an inference server. A backend's file also has `open_backend(url, token)`."""

    async def complete(self, path: str, body: bytes, target: ModelTarget) -> Reply:
        """Send a request and return its answer, of a stream as soon as its headers have come.

        Args:
            path: `/v1/chat/completions`, `/v1/completions` or `/v1/responses`.
            body: JSON as the client sent it.

        Raises:
            NotAcceptedError: when the server can't be reached, so that another may be asked.
            UnavailableError: when it disconnected in the middle.
        """

    async def health(self) -> Health:
        """Ask the server how it is.

        Raises:
            UnavailableError: when it can't be reached.
        """

    async def aclose(self) -> None:
        """Close all connections."""
