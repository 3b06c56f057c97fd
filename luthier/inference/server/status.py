"""Health, state and metrics of the inference server.

Read on the event loop while the engine's thread works; nothing here waits for that thread.
"""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.exposition import choose_encoder
from starlette.requests import Request
from starlette.responses import Response

from luthier.core.settings import Settings
from luthier.inference.engine.engine import Engine
from luthier.inference.engine.metrics import MetricsCollector, counter, gauge, histogram
from luthier.inference.models.loading import Kind
from luthier.inference.models.registry import Models
from luthier.inference.server.http import json_response


class Status:
    """The endpoints for health, state and metrics."""

    def __init__(self, settings: Settings, engine: Engine, models: Models) -> None:
        self._settings = settings
        self._engine = engine
        self._models = models
        self._registry = CollectorRegistry()
        self._registry.register(MetricsCollector(self._collect))

    @property
    def is_ready(self) -> bool:
        """Whether the engine runs, its step is none that hangs, and its preloaded base is in memory."""
        base = self._settings.preload_base
        is_running = self._engine.is_alive and not self._engine.is_stalled
        return is_running and (not base or self._models.is_loaded(base))

    async def health(self, _request: Request) -> Response:
        """Return whether the process answers, and whether its preloaded base does."""
        base = self._settings.preload_base
        return json_response({"status": "ok", "base": base, "ready": self.is_ready})

    async def state(self, _request: Request) -> Response:
        """Return what the API chooses a replica by."""
        return json_response(
            {
                "ready": self.is_ready,
                "bases": self._models.base_ids,
                "digests": self._models.loaded.held,
                "running": self._engine.num_running,
                "waiting": self._engine.num_waiting,
                "room": {
                    kind.value: self._models.loaded.stats(kind).max_bytes
                    for kind in (Kind.PACKED, Kind.WHOLE)
                },
            }
        )

    async def metrics(self, request: Request) -> Response:
        """Return the metrics in Prometheus' format."""
        encode, media_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(self._registry), media_type=media_type)

    def _collect(self) -> Iterator[Metric]:
        steps, loaded = self._engine.measures, self._models.loaded
        yield counter("tokens_generated", "Tokens of answers.", steps.num_tokens)
        yield counter("prompt_tokens", "Tokens of prompts.", steps.num_prompt_tokens)
        yield counter("steps", "Forward passes of a batch.", steps.num_steps)
        yield counter("preemptions", "Rows that lost their pages.", steps.num_preempted)
        yield counter("guessed_tokens", "Tokens that were guessed.", steps.num_drafts)
        yield counter("right_guesses", "Those that came.", steps.num_right_drafts)
        yield gauge("rows_running", "Answers that are made now.", self._engine.num_running)
        yield gauge("rows_waiting", "Answers that wait for a row.", self._engine.num_waiting)
        yield gauge("rows_max", "Rows of one batch.", self._settings.max_batch_rows)
        yield histogram("batch_rows", "Rows of a step.", steps.rows)
        yield histogram(
            "time_to_first_token_seconds",
            "From a request's model being in memory to its first token.",
            steps.first_token_seconds,
        )
        yield histogram(
            "time_between_tokens_seconds", "Between two tokens of an answer.", steps.between_tokens_seconds
        )
        yield gauge("bases", "Bases in memory.", len(self._models.base_ids))
        yield gauge("requests_waiting_for_models", "Requests that wait for room.", loaded.num_waiting)
        held = {kind.value: loaded.stats(kind) for kind in Kind}
        yield gauge("models", "Tuned models in memory.", {k: v.num_models for k, v in held.items()})
        yield gauge("model_bytes", "Memory of these.", {k: v.num_bytes for k, v in held.items()})
        yield gauge("model_bytes_max", "Memory for these.", {k: v.max_bytes for k, v in held.items()})
        yield counter("model_loads", "Loads.", {k: v.num_loads for k, v in held.items()})
        yield counter("model_evictions", "Evictions.", {k: v.num_evictions for k, v in held.items()})
