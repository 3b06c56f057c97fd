"""Health, state and metrics of the inference server.

Read on the event loop while the engine's thread works; nothing here waits for that thread.
"""

from collections.abc import Iterator, Mapping
from itertools import accumulate

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from luthier.core.settings import Settings
from luthier.inference.engine.engine import Engine
from luthier.inference.engine.step import Histogram
from luthier.inference.models.loading import Kind
from luthier.inference.models.registry import Models

_PREFIX = "luthier_inference_"


class Status(Collector):
    """The endpoints for health, state and metrics, and what prometheus-client asks for these."""

    def __init__(self, settings: Settings, engine: Engine, models: Models) -> None:
        self._settings = settings
        self._engine = engine
        self._models = models
        self._registry = CollectorRegistry()
        self._registry.register(self)

    @property
    def is_ready(self) -> bool:
        """Whether the engine runs, its step is none that hangs, and its preloaded base is in memory."""
        base = self._settings.preload_base
        is_running = self._engine.is_alive and not self._engine.is_stalled
        return is_running and (not base or self._models.is_loaded(base))

    async def health(self, _request: Request) -> Response:
        """Return whether the process answers, and whether its preloaded base does."""
        base = self._settings.preload_base
        return JSONResponse({"status": "ok", "base": base, "ready": self.is_ready})

    async def state(self, _request: Request) -> Response:
        """Return what the API chooses a replica by."""
        return JSONResponse(
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

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of this moment."""
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


def counter(name: str, meaning: str, values: int | Mapping[str, int]) -> Metric:
    """Return a counter, or one for each kind of models; `name` without `_total`."""
    return _with_values(CounterMetricFamily, name, meaning, values)


def gauge(name: str, meaning: str, values: int | Mapping[str, int]) -> Metric:
    """Return a gauge, or one for each kind of models."""
    return _with_values(GaugeMetricFamily, name, meaning, values)


def histogram(name: str, meaning: str, measured: Histogram) -> Metric:
    """Return a histogram; a bound counts all that is at or below it."""
    bounds = [*(str(float(bound)) for bound in measured.bounds), "+Inf"]
    buckets = [*zip(bounds, accumulate(list(measured.counts)), strict=True)]
    return HistogramMetricFamily(_PREFIX + name, meaning, buckets=buckets, sum_value=measured.sum)


def _with_values(
    family: type[CounterMetricFamily | GaugeMetricFamily],
    name: str,
    meaning: str,
    values: int | Mapping[str, int],
) -> Metric:
    if not isinstance(values, Mapping):
        return family(_PREFIX + name, meaning, value=values)
    made = family(_PREFIX + name, meaning, labels=["kind"])
    for kind, value in values.items():
        made.add_metric([kind], value)
    return made
