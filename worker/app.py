"""A worker: processes that take jobs from Postgres by themselves, and the threads beside them.

A job is claimed from the database, at every sweep or when a message comes; the message says only "look".
This main process trains nothing: it starts the processes that do (worker/processes.py), heartbeats, takes
jobs from workers that are gone, measures, and sends webhooks.
"""

import signal
import threading
import time

import structlog

from luthier.core.errors import LuthierError
from luthier.core.logs import configure_logs
from luthier.core.settings import Settings
from services import deliveries, files, leases, leftovers, memory, models
from services.uploads import storage_prefix
from worker.broker import consume_for_ever
from worker.calibration import calibrate_for_ever
from worker.context import WorkerContext, make_context
from worker.delivering import deliver_for_ever
from worker.processes import JobProcesses, run_job_process
from worker.serving import balance

_log = structlog.get_logger()
_TIDIED_AT_ONCE = 10
# Rows alone, with no bytes to wait for.
_DELIVERIES_AT_ONCE = 1000
# How soon a TERM is seen, and a process that has ended is missed.
_LOOK_SECONDS = 0.2


def sweep(context: WorkerContext) -> None:
    """Say that the worker lives, take jobs from dead ones, and tell serving its memory."""
    settings = context.settings
    with context.database.transaction() as session:
        leases.beat(
            session,
            context.worker_id,
            hostname=context.hostname,
            num_slots=settings.training_slots,
            facts=context.facts,
        )
        if context.device is not None:
            # A device that no job has asked for yet is there too.
            memory.lock_device(session, context.device)
    with context.database.transaction() as session:
        lost = leases.sweep(session, max_attempts=settings.max_attempts)
        memory.forget_lapsed(session)
    if lost:
        _log.warning("jobs taken from workers that stopped answering", job_ids=lost)
    balance(context)


def tidy(context: WorkerContext, *, grace_seconds: float) -> None:
    """Delete from storage what no row needs any more, however often that was tried before.

    That is what ended jobs worked with (tokenised rows, save points, what no row names), the parts of ended
    uploads, and the bytes of deleted files and models. Files that have expired are deleted first, and
    deliveries of webhooks that finished long ago are forgotten.

    Args:
        grace_seconds: how long ago a job or an upload must have ended.
    """
    with context.database.transaction() as session:
        files.delete_expired(session, limit=_TIDIED_AT_ONCE)
        deliveries.prune(
            session, kept_seconds=context.settings.webhook_kept_seconds, limit=_DELIVERIES_AT_ONCE
        )
        uploads_ended = leftovers.list_untidied_uploads(
            session, grace_seconds=grace_seconds, limit=_TIDIED_AT_ONCE
        )
    with context.database.transaction() as session:
        ended = leftovers.list_untidied(session, grace_seconds=grace_seconds, limit=_TIDIED_AT_ONCE)
        files_gone = files.list_undeleted_bytes(session, limit=_TIDIED_AT_ONCE)
        models_gone = models.list_undeleted_bytes(session, limit=_TIDIED_AT_ONCE)
    for file_id, key in files_gone:
        context.storage.delete(key)
        with context.database.transaction() as session:
            files.mark_bytes_deleted(session, file_id)
    for model_id, prefix in models_gone:
        context.storage.delete_prefix(prefix)
        with context.database.transaction() as session:
            models.mark_bytes_deleted(session, model_id)
    for upload in uploads_ended:
        prefix = storage_prefix(upload.project_id, upload.upload_id)
        context.storage.delete_all_but(prefix, [upload.kept_key] if upload.kept_key else [])
        with context.database.transaction() as session:
            leftovers.mark_upload_tidied(session, upload.upload_id)
    for job in ended:
        prefix = f"projects/{job.project_id}/jobs/{job.job_id}"
        context.storage.delete_all_but(prefix, job.kept_prefixes)
        with context.database.transaction() as session:
            leftovers.mark_tidied(session, job.job_id)


def _sweep_for_ever(context: WorkerContext) -> None:
    """Sweep until the worker stops; runs in a thread, which no fault ends: jobs are lost without its beat."""
    while not context.stopping.wait(context.settings.sweep_seconds):
        try:
            sweep(context)
            tidy(context, grace_seconds=2 * context.settings.lease_seconds)
        except LuthierError as error:
            _log.warning("sweep put off", reason=error.message)
        except Exception:  # noqa: BLE001
            _log.exception("sweep put off")


def run(settings: Settings, *, has_broker: bool = True) -> None:
    """Work until TERM.

    Args:
        has_broker: whether messages from the broker wake the worker between its looks into Postgres.
    """
    started_at = time.monotonic()
    context = make_context(settings)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: context.stopping.set())
    processes = JobProcesses(context.worker_id, settings.training_slots + 1, has_broker=has_broker)
    woken = threading.Event()
    threads = [_sweep_for_ever, calibrate_for_ever, deliver_for_ever]
    for target in threads:
        threading.Thread(target=target, args=(context,), daemon=True).start()
    if has_broker:
        threading.Thread(target=consume_for_ever, args=(context, woken.set), daemon=True).start()
    _log.info("worker ready", worker_id=context.worker_id, has_broker=has_broker)
    while not context.stopping.is_set():
        processes.keep_running()
        if woken.wait(_LOOK_SECONDS):
            woken.clear()
            processes.wake()
    processes.stop()
    _log.info("worker stopped", seconds=round(time.monotonic() - started_at))


def main(arguments: list[str]) -> None:
    """Run a worker; `--no-broker` looks into Postgres only. `--process` is what a worker starts itself."""
    settings = Settings()
    configure_logs(settings.log_level)
    has_broker = "--no-broker" not in arguments
    if "--process" in arguments:
        worker_id, parent_pid = arguments[-2:]
        run_job_process(settings, worker_id, int(parent_pid), has_broker=has_broker)
    else:
        run(settings, has_broker=has_broker)
