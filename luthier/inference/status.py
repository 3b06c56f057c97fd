"""What the server tells of itself to the API: what it holds, and how busy it is.

Read on the event loop while the engine's thread works; nothing here waits for that thread.
"""

from starlette.requests import Request
from starlette.responses import Response

from luthier.core.settings import Settings
from luthier.inference.engine import Engine
from luthier.inference.models import Models
from luthier.inference.wire import json_response


class Status:
    """The endpoints that tell of the process.

    Args:
        settings: the server's.
        engine: the engine's thread.
        models: what is loaded.
    """

    def __init__(self, settings: Settings, engine: Engine, models: Models) -> None:
        self._settings = settings
        self._engine = engine
        self._models = models

    @property
    def is_ready(self) -> bool:
        """Whether the engine runs and its preloaded base is in memory."""
        base = self._settings.preload_base
        return self._engine.is_alive and (not base or self._models.is_loaded(base))

    async def health(self, _request: Request) -> Response:
        """Say that the process answers, and whether its preloaded base does."""
        base = self._settings.preload_base
        return json_response({"status": "ok", "base": base, "ready": self.is_ready})

    async def state(self, _request: Request) -> Response:
        """Tell the API what to choose servers by."""
        return json_response(
            {
                "ready": self.is_ready,
                "bases": self._models.base_ids,
                "digests": self._models.loaded.held,
                "running": self._engine.num_rows,
                "waiting": self._engine.num_waiting,
            }
        )
