"""What the API counts: Prometheus metrics, and the usage of requests, which is stored every second.

At each scrape the database's jobs and workers are read, too.
"""

import asyncio
from functools import partial

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from starlette.concurrency import run_in_threadpool

from db.session import Database
from luthier.core.errors import UnavailableError
from luthier.core.inference import TokenCounts
from services.accounts import usage
from services.accounts.usage import UsageOwner
from services.capacity import metrics

_FLUSH_SECONDS = 1.0
_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_log = structlog.get_logger()


class ApiMetrics:
    """The metrics of one API process.

    Labels are route templates and status codes, never ids, names or paths, so that their number is bounded.
    """

    def __init__(self, database: Database, *, lease_seconds: float) -> None:
        self.registry = CollectorRegistry()
        self._requests = Histogram(
            "http_server_request_duration_seconds",
            "From a request's arrival to the end of its answer, a stream's too.",
            ["method", "route", "status"],
            buckets=_BOUNDS,
            registry=self.registry,
        )
        self.open_streams = Gauge(
            "luthier_open_streams", "Event streams that are being sent.", registry=self.registry
        )
        self._tokens = Counter(
            "luthier_tokens", "Tokens of answered requests.", ["kind"], registry=self.registry
        )
        ProcessCollector(registry=self.registry)
        read = partial(metrics.read_queue, lease_seconds=lease_seconds)
        self.registry.register(metrics.DatabaseCollector(database, read))

    def observe_request(self, method: str, route: str | None, status: int, seconds: float) -> None:
        """Count a finished request; `route` is its template, or None without a route."""
        self._requests.labels(method, route or "none", str(status)).observe(seconds)

    def count_tokens(self, counts: TokenCounts) -> None:
        """Count the tokens of an answer; cached ones are among the input's."""
        self._tokens.labels("input").inc(counts.input_tokens)
        self._tokens.labels("input_cached").inc(counts.input_cached_tokens)
        self._tokens.labels("output").inc(counts.output_tokens)


class UsageRecorder:
    """Counts by key and model. A killed process loses the counts of its last second."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._counts: dict[UsageOwner, TokenCounts] = {}
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Store the rest."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self.flush()

    def add(self, owner: UsageOwner, counts: TokenCounts) -> None:
        """Count a request; called on the event loop."""
        self._counts.setdefault(owner, TokenCounts()).add(counts)

    async def flush(self) -> None:
        """Store the counts; they are kept for the next flush when that fails."""
        counts, self._counts = self._counts, {}
        if not counts:
            return
        # Shielded: after a cancellation in the middle, counts would be stored twice.
        await asyncio.shield(self._store(counts))

    async def _store(self, counts: dict[UsageOwner, TokenCounts]) -> None:
        try:
            await run_in_threadpool(self._write, counts)
        except UnavailableError:
            _log.warning("usage could not be stored yet", num_owners=len(counts))
        except Exception:  # noqa: BLE001
            # Counting continues for as long as the process lives.
            _log.exception("usage could not be stored", num_owners=len(counts))
        else:
            return
        for owner, used in counts.items():
            self.add(owner, used)

    def _write(self, counts: dict[UsageOwner, TokenCounts]) -> None:
        with self._database.transaction() as session:
            usage.record(session, counts)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(_FLUSH_SECONDS)
            await self.flush()
