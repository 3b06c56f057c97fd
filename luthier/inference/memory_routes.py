"""What the server tells a worker of its memory, and how it takes a ceiling from it."""

import torch
from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import Response

from luthier.core.errors import InvalidRequestError
from luthier.core.inference import MemoryOrder, MemoryState
from luthier.core.settings import Settings
from luthier.inference.bases import choose_device
from luthier.inference.memory import identify
from luthier.inference.models import Models
from luthier.inference.wire import json_response, read_body


class MemoryRoutes:
    """The endpoints of the ledger."""

    def __init__(self, settings: Settings, models: Models) -> None:
        self._models = models
        self._who = identify(settings, torch.device(choose_device(settings)))

    def state(self) -> MemoryState:
        """Return what the process holds."""
        ceiling, loaded = self._models.ceiling, self._models.loaded
        server_id, hostname, device = self._who
        held = ceiling.used_bytes + ceiling.growing_bytes + loaded.loading_bytes
        spare = ceiling.spare_bytes
        return MemoryState(
            server_id=server_id,
            hostname=hostname,
            device=device,
            held_bytes=held,
            idle_bytes=min(held, spare + loaded.idle_bytes),
            floor_bytes=max(0, held - spare - loaded.leaving_bytes),
            version=ceiling.version,
        )

    async def tell(self, _request: Request) -> Response:
        """Answer GET /internal/memory."""
        return json_response(self.state().model_dump())

    async def obey(self, request: Request) -> Response:
        """Answer POST /internal/memory: give back what is idle beyond the ceiling, and tell what is held."""
        try:
            order = MemoryOrder.model_validate_json(await read_body(request))
        except ValidationError as error:
            raise InvalidRequestError("The body is no order of memory.") from error
        ceiling, loaded = self._models.ceiling, self._models.loaded
        if ceiling.take(order):
            missing = await ceiling.fit(loaded.loading_bytes)
            if missing > 0:
                await loaded.give_back(missing)
                await ceiling.fit(loaded.loading_bytes)
            loaded.wake()
        return json_response(self.state().model_dump())
