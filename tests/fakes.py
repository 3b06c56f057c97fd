"""Stand-ins where a unit of the service is tested without its neighbour."""

import json
from dataclasses import dataclass, field

from luthier.core.inference import ModelTarget
from luthier.serving.base import Health, Reply


@dataclass
class FakeBackend:
    """An inference server that remembers what it was asked and answers the same every time."""

    asked: list[tuple[str, bytes, ModelTarget]] = field(default_factory=list)
    status: int = 200
    room_bytes: dict[str, int] = field(default_factory=dict)
    answer: bytes = json.dumps({"object": "chat.completion", "choices": []}).encode()

    async def complete(self, path: str, body: bytes, target: ModelTarget) -> Reply:
        """Remember the request and answer."""
        self.asked.append((path, body, target))
        return Reply(self.status, {"content-type": "application/json"}, self.answer)

    async def health(self) -> Health:
        """Return that all is well."""
        return Health(
            is_ready=True, holds=frozenset(), num_running=0, num_waiting=0, room_bytes=self.room_bytes
        )

    async def aclose(self) -> None:
        """Do nothing; there is no connection."""
