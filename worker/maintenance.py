"""Maintenance of a worker: its heartbeat, jobs of dead workers, and garbage collection.

Each task runs in its own loop, so that none waits because another waits for storage.
"""

import itertools
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import structlog

from db.tables import File, Model
from luthier.core.errors import LuthierError, UnavailableError
from luthier.storage.store import Storage
from services.capacity import memory, workers
from services.files import files, storage_gc
from services.files.storage_gc import Garbage
from services.jobs import idempotency, leases
from services.webhooks import deliveries
from worker.context import WorkerContext, remove_run_dir

_log = structlog.get_logger()
T = TypeVar("T")
_COLLECTED_AT_ONCE = 10
# Rows alone, with no bytes to wait for.
_ROWS_AT_ONCE = 1000
# After this number of failures in a round storage itself counts as unavailable.
_MAX_FAILURES = 3
_RETRY_SECONDS = 600.0
_ORPHANS_EVERY_SECONDS = 3600.0
_IDS_AT_ONCE = 500
_JOB_FOLDER = re.compile(r"ftjob-[\w-]+")
_ATTEMPT_FOLDER = re.compile(r"e(\d+)")


def repeat(
    context: WorkerContext, what: str, act: Callable[[WorkerContext], object], max_seconds: float = math.inf
) -> None:
    """Do something now and at every sweep until the worker stops, whatever it raises; runs in a thread."""
    while True:
        try:
            act(context)
        except LuthierError as error:
            _log.warning(f"{what} put off", reason=error.message)
        except Exception:  # noqa: BLE001
            # The other tasks, and the jobs of this worker, continue.
            _log.exception(f"{what} failed")
        if context.stopping.wait(min(max_seconds, context.settings.sweep_seconds)):
            return


def beat(context: WorkerContext) -> None:
    found = context.device
    device = {"device": str(found), "device_bytes": None if found is None else found.total_bytes}
    with context.database.transaction() as session:
        workers.beat(
            session,
            context.worker_id,
            hostname=context.hostname,
            num_slots=context.settings.training_slots,
            facts=context.facts | {"bases": context.list_bases()} | device,
        )


def take_lost_jobs(context: WorkerContext) -> None:
    """Take jobs and memory from workers that stopped answering, and note jobs that no worker can run."""
    with context.database.transaction() as session:
        workers.note_waiting_jobs(session)
    if not context.watch.has_seen_a_lease():
        return
    with context.database.transaction() as session:
        lost = leases.sweep(session)
        memory.forget_lapsed(session)
        workers.forget_gone(session)
    if lost:
        _log.warning("jobs taken from workers that stopped answering", job_ids=lost)


def run_garbage_collection(context: WorkerContext) -> None:
    """Delete from storage what nothing needs any more."""
    collect_garbage(context, grace_seconds=2 * context.settings.lease_seconds)
    now = time.monotonic()
    if now >= context.orphans_due_at:
        context.orphans_due_at = now + min(_ORPHANS_EVERY_SECONDS, context.settings.orphan_seconds)
        delete_orphans(context)


def collect_garbage(context: WorkerContext, *, grace_seconds: float) -> None:
    """Delete from storage what no row needs any more, however often that was tried before.

    That is what ended jobs worked with (tokenised rows, save points, what no row names), the parts of ended
    uploads, and the bytes of deleted files and models. Files that have expired are deleted first, and so are
    old idempotency keys and deliveries of webhooks that finished long ago. What can't be deleted is passed
    over, and tried again later.
    """
    with context.database.transaction() as session:
        files.delete_expired(session, limit=_COLLECTED_AT_ONCE)
        deliveries.prune(session, kept_seconds=context.settings.webhook_kept_seconds, limit=_ROWS_AT_ONCE)
        idempotency.prune(session, limit=_ROWS_AT_ONCE)
    failures, now = 0, time.monotonic()
    context.undeletable = {row: due for row, due in context.undeletable.items() if due > now}
    with context.database.transaction() as session:
        found = storage_gc.list_garbage(
            session,
            grace_seconds=grace_seconds,
            limit=_COLLECTED_AT_ONCE,
            skipped=list(context.undeletable),
        )
    for garbage in found:
        try:
            _delete(context.storage, garbage)
        except (UnavailableError, OSError) as error:
            context.undeletable[garbage.row_id] = time.monotonic() + _RETRY_SECONDS
            failures += 1
            _log.warning("not deleted, tried again later", row_id=garbage.row_id, reason=str(error))
            if failures >= _MAX_FAILURES:
                raise
            continue
        with context.database.transaction() as session:
            storage_gc.mark_collected(session, garbage)


def _delete(storage: Storage, garbage: Garbage) -> None:
    if garbage.table is File:
        storage.delete(garbage.key)
    elif garbage.table is Model:
        storage.delete_prefix(garbage.key)
    else:
        storage.delete_all_but(garbage.key, garbage.kept_prefixes)


def remove_stale_runs(context: WorkerContext) -> None:
    """Remove run directories of attempts that hold no job: their processes were killed."""
    found = [
        (job.name, int(match[1]), folder)
        for job in _folders(context.settings.runs_dir, _JOB_FOLDER)
        for folder in _folders(job, _ATTEMPT_FOLDER)
        if (match := _ATTEMPT_FOLDER.fullmatch(folder.name))
    ]
    # The database is asked after the disk: an attempt has its lease before its folder.
    for some in _batched(found, _IDS_AT_ONCE):
        with context.database.transaction() as session:
            held = leases.list_held(session, {job_id for job_id, _, _ in some})
        for job_id, epoch, folder in some:
            if (job_id, epoch) not in held:
                remove_run_dir(folder)


def _folders(parent: Path, pattern: re.Pattern[str]) -> list[Path]:
    try:
        return [path for path in parent.iterdir() if pattern.fullmatch(path.name) and path.is_dir()]
    except OSError:
        return []


def delete_orphans(context: WorkerContext) -> None:
    """Delete old objects of files that have no row: the API died between their bytes and their row."""
    for prefix in context.storage.list_prefixes("projects"):
        age_seconds = context.settings.orphan_seconds
        context.storage.delete_unfinished(f"{prefix}/files", age_seconds=age_seconds)
        old = context.storage.list_old(f"{prefix}/files", age_seconds=age_seconds)
        for keys in _batched(old, _IDS_AT_ONCE):
            with context.database.transaction() as session:
                named = files.list_known(session, {_file_id(key) for key in keys})
            for key in keys:
                if _file_id(key) not in named:
                    context.storage.delete(key)
                    _log.info("an object without a row was deleted", key=key)


def _batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def _file_id(key: str) -> str:
    return key.rpartition("/")[2]
