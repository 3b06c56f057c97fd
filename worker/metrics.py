"""A worker's metrics for Prometheus, on an address of their own: its slots, leases and attempts.

The main process reads them from the database at each scrape, since jobs run in other processes.
"""

from collections.abc import Iterable

import structlog
from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from luthier.core.errors import LuthierError
from services.capacity import metrics
from worker.context import WorkerContext

_log = structlog.get_logger()


class _WorkerCollector(Collector):
    def __init__(self, context: WorkerContext) -> None:
        self._context = context

    def collect(self) -> Iterable[Metric]:
        """Read the database; without it only that is reported."""
        settings = self._context.settings
        try:
            with self._context.database.transaction() as session:
                found = metrics.read_worker(
                    session, self._context.worker_id, lease_seconds=settings.lease_seconds
                )
        except LuthierError:
            yield GaugeMetricFamily("luthier_database_up", "Whether the database answers.", value=0)
            return
        for name, meaning, value in (
            ("database_up", "Whether the database answers.", 1),
            ("worker_slots", "Jobs that this worker trains at the same time.", settings.training_slots),
            ("worker_slots_free", "Slots without a job.", settings.training_slots - found.num_running),
            ("worker_lease_age_seconds", "Since its oldest lease was renewed.", found.oldest_lease_seconds),
        ):
            yield GaugeMetricFamily(f"luthier_{name}", meaning, value=value)
        attempts = CounterMetricFamily(
            "luthier_worker_attempts", "Attempts of this worker that ended.", labels=["outcome"]
        )
        for outcome, number in found.num_attempts.items():
            attempts.add_metric([outcome], number)
        yield attempts

    def describe(self) -> Iterable[Metric]:
        """Return nothing: a registration must not ask the database."""
        return ()


def serve_metrics(context: WorkerContext) -> None:
    """Answer `GET /metrics` from a thread of this process, where an address is set."""
    address = context.settings.worker_metrics_address
    if not address:
        return
    host, _, port = address.rpartition(":")
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    registry.register(_WorkerCollector(context))
    try:
        start_http_server(int(port), addr=host.strip("[]"), registry=registry)
    except (ValueError, OSError) as error:
        # No reason to leave jobs untrained.
        _log.error("metrics are not served", address=address, reason=str(error))
