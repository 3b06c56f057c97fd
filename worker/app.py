"""The Celery application of a worker: bells in, jobs out, a sweep for what no bell announced.

A bell only says "look". Whichever bell wakes a process, it prepares the job that the bell names if that
still waits, and then trains queued jobs until there is none or no slot is free.
"""

import os
import signal
import threading
import time
from pathlib import Path

import structlog
from celery import Celery
from celery.signals import worker_process_init, worker_ready, worker_shutting_down

from luthier.core.errors import LuthierError
from luthier.core.logs import configure_logs
from luthier.core.process import die_with_parent
from luthier.core.settings import Settings
from services import deliveries, files, leases, leftovers, memory, models
from services.bell import TASK_NAME, make_celery
from services.uploads import storage_prefix
from worker.calibration import calibrate_for_ever
from worker.context import WorkerContext, make_context
from worker.delivering import deliver_for_ever
from worker.serving import balance
from worker.tasks.prepare import prepare
from worker.tasks.train import Claimed, claim, train

_log = structlog.get_logger()
_TIDIED_AT_ONCE = 10
# Rows alone, with no bytes to wait for.
_DELIVERIES_AT_ONCE = 1000


def work(context: WorkerContext, job_id: str | None) -> None:
    """Do what there is to do: prepare the job that was announced, then train while jobs are queued.

    Others hear of a job that was prepared here once this process has looked and taken another, or none: its
    spare has begun with the imports.
    """
    is_unheard = job_id is not None and prepare(context, job_id)
    claimed = None
    try:
        claimed = _claim_next(context)
    finally:
        if job_id is not None and is_unheard and (claimed is None or claimed.lease.job_id != job_id):
            context.ring(job_id)
    while claimed is not None:
        train(context, claimed)
        context.keep_spare()
        claimed = _claim_next(context)
    if context.stopping.is_set() and context.spare is not None:
        context.spare.stop()


def _claim_next(context: WorkerContext) -> Claimed | None:
    return None if context.stopping.is_set() else claim(context)


def sweep(context: WorkerContext) -> list[str]:
    """Say that the worker lives, take jobs from dead ones, tell serving its memory, and find what waits.

    Returns:
        Ids of waiting jobs, at most as many as this worker could take now.
    """
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
    with context.database.transaction() as session:
        return list(leases.list_waiting(session, limit=settings.training_slots + 1))


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
    """Ring for waiting jobs at every sweep; runs in a thread of the main process."""
    while not context.stopping.wait(context.settings.sweep_seconds):
        try:
            for job_id in sweep(context):
                context.ring(job_id)
            tidy(context, grace_seconds=2 * context.settings.lease_seconds)
        except LuthierError as error:
            _log.warning("sweep put off", reason=error.message)
        except Exception:
            # A worker without its sweep is deaf and looks dead: better ended, and started anew.
            _log.exception("the sweep has broken, the worker ends")
            os.kill(os.getpid(), signal.SIGTERM)
            raise


def _tell_processes_to_stop(pids: list[int]) -> None:
    # Not SIGUSR1: Celery's pool takes that for its own time limits, after our handler is set.
    for pid in pids:
        try:
            os.kill(pid, signal.SIGUSR2)
        except ProcessLookupError:
            continue


def _child_pids() -> list[int]:
    children = Path(f"/proc/{os.getpid()}/task")
    return [int(pid) for thread in children.iterdir() for pid in (thread / "children").read_text().split()]


def make_worker(settings: Settings) -> Celery:
    """Return the Celery application of a worker process.

    Its pool has a process per training slot and one more, so that files are checked while jobs train.
    """
    context = make_context(settings)
    app = make_celery(settings.redis_url.get_secret_value())
    app.conf.update(worker_concurrency=settings.training_slots + 1)
    main_pid = os.getpid()

    @app.task(name=TASK_NAME, ignore_result=True)
    def wake(job_id: str) -> None:
        work(context, job_id)

    def start_process(**_: object) -> None:
        # A pool process must not outlive the main one: a training process hangs on its life.
        die_with_parent(main_pid)
        # The parent's sockets are not ours to use.
        context.database.forget_connections()
        signal.signal(signal.SIGUSR2, lambda *_: context.stopping.set())
        # The first job would wait for its imports otherwise.
        context.keep_spare()

    def start_sweeping(**_: object) -> None:
        _log.info("worker ready", worker_id=context.worker_id)
        threading.Thread(target=_sweep_for_ever, args=(context,), daemon=True).start()
        threading.Thread(target=calibrate_for_ever, args=(context,), daemon=True).start()
        threading.Thread(target=deliver_for_ever, args=(context,), daemon=True).start()

    def stop(**_: object) -> None:
        # Celery now waits for running tasks; a training one ends once it knows that it should.
        context.stopping.set()
        _tell_processes_to_stop(_child_pids())

    worker_process_init.connect(start_process, weak=False)
    worker_ready.connect(start_sweeping, weak=False)
    worker_shutting_down.connect(stop, weak=False)
    return app


def run_without_broker(settings: Settings) -> None:
    """Work by looking into Postgres alone: no Celery, no Redis, one job at a time."""
    context = make_context(settings)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: context.stopping.set())
    # The sweep's bells ring nobody: this thread looks by itself.
    context.ring = lambda _job_id: None
    threading.Thread(target=_sweep_for_ever, args=(context,), daemon=True).start()
    threading.Thread(target=calibrate_for_ever, args=(context,), daemon=True).start()
    threading.Thread(target=deliver_for_ever, args=(context,), daemon=True).start()
    context.keep_spare()
    _log.info("worker ready, without a broker", worker_id=context.worker_id)
    before: list[str] = []
    while not context.stopping.is_set():
        waiting: list[str] = []
        try:
            with context.database.transaction() as session:
                waiting = list(leases.list_waiting(session, limit=1))
            work(context, waiting[0] if waiting else None)
        except LuthierError as error:
            _log.warning("look put off", reason=error.message)
        # One that waits for memory is the same again; so may one be that was just prepared, which costs it a
        # sweep at most.
        if not waiting or waiting == before:
            context.stopping.wait(context.settings.sweep_seconds)
        before = waiting


def run(settings: Settings) -> None:
    """Work until TERM: bells from the broker, and a sweep."""
    started_at = time.monotonic()
    app = make_worker(settings)
    app.worker_main(
        [
            "worker",
            "--loglevel=WARNING",
            "--pool=prefork",
            "--without-gossip",
            "--without-mingle",
            "--without-heartbeat",
            f"--hostname=luthier-{os.getpid()}@%h",
        ]
    )
    _log.info("worker stopped", seconds=round(time.monotonic() - started_at))


def main(arguments: list[str]) -> None:
    """Run a worker; `--no-broker` looks into Postgres only."""
    settings = Settings()
    configure_logs(settings.log_level)
    if "--no-broker" in arguments:
        run_without_broker(settings)
    else:
        run(settings)
