"""The worker's main process: starts job processes and runs the maintenance threads.

Jobs are claimed from Postgres, at every sweep or when a message wakes the worker. This process trains
nothing: it starts those that do (worker/processes.py), sends heartbeats, takes jobs from dead workers, sends
webhooks and serves metrics.
"""

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import structlog
from celery.worker import WorkController
from celery.worker.consumer import Consumer
from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server

from luthier.core.errors import UnavailableError
from luthier.core.logs import configure_logs
from luthier.core.runtime import hide_memory
from luthier.core.settings import Settings
from services.capacity import metrics, workers
from services.task_queue import TASK_NAME, make_celery
from worker.context import WorkerContext, make_context, stop_on_signals
from worker.maintenance import beat, remove_stale_runs, repeat, run_garbage_collection, take_lost_jobs
from worker.processes import JobProcesses, run_job_process
from worker.speed import measure_once
from worker.webhook_dispatcher import deliver_for_ever

_log = structlog.get_logger()
# The heartbeat's longest interval, however long a sweep's is.
_MAX_BEAT_SECONDS = workers.ALIVE_SECONDS / 6
# How soon a TERM, or the end of a process, is noticed.
_LOOK_SECONDS = 0.2


def sweep(context: WorkerContext) -> None:
    """Record that the worker lives, and take jobs from dead ones."""
    beat(context)
    take_lost_jobs(context)


def run(settings: Settings, *, has_broker: bool = True) -> None:
    started_at = time.monotonic()
    context = make_context(settings)
    stop_on_signals(context)
    processes = JobProcesses(context.worker_id, settings.training_slots + 1, has_broker=has_broker)
    # No Event: a signal within its `clear` would wait for the lock that the interrupted thread holds.
    hang_ups: list[int] = []
    signal.signal(signal.SIGHUP, lambda number, _: hang_ups.append(number))
    woken = threading.Event()
    parts: dict[str, tuple[Callable[[WorkerContext], object], float]] = {
        "heartbeat": (beat, _MAX_BEAT_SECONDS),
        "taking of lost jobs": (take_lost_jobs, math.inf),
        "garbage collection": (run_garbage_collection, math.inf),
        "removal of run directories": (remove_stale_runs, math.inf),
    }
    for what, (act, max_seconds) in parts.items():
        threading.Thread(target=repeat, args=(context, what, act, max_seconds), daemon=True).start()
    for target in (measure_once, deliver_for_ever):
        threading.Thread(target=target, args=(context,), daemon=True).start()
    if has_broker:
        threading.Thread(target=consume_for_ever, args=(context, woken.set), daemon=True).start()
    serve_metrics(context)
    _log.info("worker ready", worker_id=context.worker_id, has_broker=has_broker)
    while not context.stopping.is_set():
        processes.keep_running()
        if hang_ups:
            hang_ups.clear()
            context.read_catalogue()
            processes.read_catalogue()
        if woken.wait(_LOOK_SECONDS):
            woken.clear()
            processes.wake()
    processes.stop()
    with contextlib.suppress(UnavailableError), context.database.transaction() as session:
        workers.retire(session, context.worker_id)
    _log.info("worker stopped", seconds=round(time.monotonic() - started_at))


def main(arguments: list[str]) -> None:
    """Run a worker; `--no-broker` looks into Postgres only. `--process` is what a worker starts itself."""
    # A training process runs as the same user.
    hide_memory()
    settings = Settings()
    configure_logs(settings.log_level)
    has_broker = "--no-broker" not in arguments
    if "--process" in arguments:
        worker_id, parent_pid = arguments[-2:]
        run_job_process(settings, worker_id, int(parent_pid), has_broker=has_broker)
    else:
        run(settings, has_broker=has_broker)


def consume_for_ever(context: WorkerContext, wake: Callable[[], None]) -> None:
    """Call `wake` for each wake-up message until the worker stops; runs in a thread.

    It runs no task and trusts no header, for others may write to the broker's queue: any message is
    acknowledged and makes the worker read Postgres, and remote control is off. What ends the consumer, such
    as bytes in the queue that are no message, costs its connection alone.
    """

    class WakeConsumer(Consumer):
        def create_task_handler(self, *_: Any, **__: Any) -> Callable[[Any], None]:
            def take(message: Any) -> None:
                message.ack_log_error(_log, self.connection_errors)
                if isinstance(message.headers, dict) and message.headers.get("task") == TASK_NAME:
                    wake()

            return take

    app = make_celery(context.settings.redis_url.get_secret_value())
    app.conf.worker_consumer = WakeConsumer
    while not context.stopping.is_set():
        try:
            WorkController(
                app=app,
                hostname=f"luthier@{context.worker_id}",
                pool="solo",
                concurrency=1,
                use_eventloop=False,
                without_gossip=True,
                without_mingle=True,
                without_heartbeat=True,
            ).start()
        except Exception:  # noqa: BLE001
            _log.exception("messages are not read")
        # Until it is back, the worker's processes look at every sweep.
        context.stopping.wait(context.settings.sweep_seconds)


def serve_metrics(context: WorkerContext) -> None:
    """Answer `GET /metrics` from a thread of this process, where an address is set."""
    address = context.settings.worker_metrics_address
    if not address:
        return
    host, _, port = address.rpartition(":")
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    read = partial(
        metrics.read_worker,
        worker_id=context.worker_id,
        num_slots=context.settings.training_slots,
        lease_seconds=context.settings.lease_seconds,
    )
    registry.register(metrics.DatabaseCollector(context.database, read))
    try:
        start_http_server(int(port), addr=host.strip("[]"), registry=registry)
    except (ValueError, OSError) as error:
        # No reason to leave jobs untrained.
        _log.error("metrics are not served", address=address, reason=str(error))
