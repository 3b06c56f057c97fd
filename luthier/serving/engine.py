"""The client of Luthier's own inference server, over a Unix socket or TCP with the internal token."""

import json

from luthier.core.errors import UnavailableError
from luthier.core.inference import HEADER_DIGEST, HEADER_TOKEN, HEADER_USAGE, ModelTarget
from luthier.core.settings import Settings
from luthier.serving._client import InferenceClient, is_local
from luthier.serving.base import Health, Reply

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
        """Send a request and return its answer, of a stream as soon as its headers have come."""
        response = await self._client.post(path, body, target.to_headers() | {HEADER_USAGE: "1"})
        status = response.status_code
        passed = {name: value for name, value in response.headers.items() if name in _PASSED_HEADERS}
        if not passed.get("content-type", "").startswith("text/event-stream"):
            return Reply(status, passed, await self._client.read(response))
        return Reply(status, passed, events=self._client.pieces(response), aclose=response.aclose)

    async def health(self) -> Health:
        """Ask the server how it is."""
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
        """Close all connections."""
        await self._client.aclose()


def open_backend(url: str, token: str, settings: Settings | None = None) -> EngineBackend:  # noqa: ARG001
    """Return a client of the server at a URL."""
    return EngineBackend(url, token)
