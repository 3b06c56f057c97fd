"""What the server tells of itself to the API: what it holds, and how busy it is.

Read on the event loop while the engine's thread works; nothing here waits for that thread.
"""

from starlette.requests import Request
from starlette.responses import Response

from luthier.core.settings import Settings
from luthier.inference.engine import Engine
from luthier.inference.loading import Kind
from luthier.inference.measures import CONTENT_TYPE, Exposition
from luthier.inference.models import Models
from luthier.inference.wire import json_response


class Status:
    """The endpoints that tell of the process."""

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

    async def metrics(self, _request: Request) -> Response:
        """Tell Prometheus what the process has done and holds."""
        told, steps = Exposition(), self._engine.measures
        told.number("tokens_generated_total", "counter", "Tokens of answers.", steps.num_tokens)
        told.number("prompt_tokens_total", "counter", "Tokens of prompts.", steps.num_prompt_tokens)
        told.number("steps_total", "counter", "Forward passes of a batch.", steps.num_steps)
        told.number("preemptions_total", "counter", "Rows that lost their pages.", steps.num_preempted)
        told.number("guessed_tokens_total", "counter", "Tokens that were guessed.", steps.num_guesses)
        told.number("right_guesses_total", "counter", "Those that came.", steps.num_right_guesses)
        told.number("rows_running", "gauge", "Answers that are made now.", self._engine.num_rows)
        told.number("rows_waiting", "gauge", "Answers that wait for a row.", self._engine.num_waiting)
        told.number("rows_max", "gauge", "Rows of one batch.", self._settings.max_batch_rows)
        told.histogram("batch_rows", "Rows of a step.", steps.rows)
        told.histogram(
            "time_to_first_token_seconds",
            "From a request's model being in memory to its first token.",
            steps.first_token_seconds,
        )
        told.histogram(
            "time_between_tokens_seconds", "Between two tokens of an answer.", steps.between_tokens_seconds
        )
        self._tell_models(told)
        return Response(told.text(), media_type=CONTENT_TYPE)

    def _tell_models(self, told: Exposition) -> None:
        loaded = self._models.loaded
        told.number("bases", "gauge", "Bases in memory.", len(self._models.base_ids))
        told.number(
            "requests_waiting_for_models", "gauge", "Requests that wait for room.", loaded.num_waiting
        )
        held = {kind.value: loaded.tell(kind) for kind in Kind}
        for name, kind, meaning, values in (
            ("models", "gauge", "Tuned models in memory.", {k: v.num_models for k, v in held.items()}),
            ("model_bytes", "gauge", "Memory of these.", {k: v.num_bytes for k, v in held.items()}),
            ("model_bytes_max", "gauge", "Memory for these.", {k: v.max_bytes for k, v in held.items()}),
            ("model_loads_total", "counter", "Loads.", {k: v.num_loads for k, v in held.items()}),
            ("model_evictions_total", "counter", "Evictions.", {k: v.num_evictions for k, v in held.items()}),
        ):
            told.number(name, kind, meaning, values)
