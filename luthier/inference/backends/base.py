"""What a backend is: a client of some inference server that speaks OpenAI's protocol. Never torch."""

from collections.abc import Callable, Mapping
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
    ids and whole models' digests that it can ever answer for, None where that is everything.
    """

    is_ready: bool
    holds: frozenset[str]
    num_running: int
    num_waiting: int
    serves: frozenset[str] | None = None


class Body(Protocol):
    """An asynchronous iterator of bytes that can be closed at any moment."""

    def __aiter__(self) -> "Body":
        """Return itself."""

    async def __anext__(self) -> bytes:
        """Return the next piece."""

    async def aclose(self) -> None:
        """Stop reading; harmless at the end, and when nothing was read."""


class Reply(NamedTuple):
    """An upstream's answer as it comes: status, the headers worth passing on, and the body in pieces.

    Whoever takes it runs `body` to its end or calls its `aclose`, which tells the upstream to stop.
    `pass_to`, where there is one, takes a function that pieces are offered to as they come, on the loop's
    thread, in place of waking who waits for the next one. What it says no to is read as ever; it may not
    raise. Whoever puts something over `body` that changes pieces leaves it out.
    """

    status: int
    headers: Mapping[str, str]
    body: Body
    pass_to: Callable[[Callable[[bytes], bool]], None] | None = None


class Backend(Protocol):
    """A client of an inference server. A backend's file also has `open_backend(url, token)`."""

    async def complete(self, path: str, body: bytes, target: ModelTarget) -> Reply:
        """Send a request and return as soon as the answer's headers are there.

        Args:
            path: `/v1/chat/completions`, `/v1/completions` or `/v1/responses`.
            body: JSON as the client sent it.

        Returns:
            The answer, its body still to be read.

        Raises:
            NotAcceptedError: when the server can't be reached, so that another may be asked.
            UnavailableError: when it left before its first byte.
        """

    async def health(self) -> Health:
        """Ask the server how it is.

        Returns:
            What it says of itself.

        Raises:
            UnavailableError: when it can't be reached.
        """

    async def aclose(self) -> None:
        """Close all connections."""
