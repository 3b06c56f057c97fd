"""An attempt at a job under its lease, and how an error ends it.

A job waits again when a resource is unavailable or missing, which counts as no crash.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import structlog

from luthier.core.errors import (
    BaseUnavailableError,
    LuthierError,
    StorageFullError,
    UnavailableError,
    UnsuitableMachineError,
)
from services.jobs import leases
from services.jobs.leases import Lease, LeaseLostError
from worker.context import WorkerContext
from worker.heartbeat import LeaseHeartbeat, lease_heartbeat

_log = structlog.get_logger()

# What this machine lacks, and another one may have.
_OF_THIS_MACHINE = (BaseUnavailableError, StorageFullError, UnsuitableMachineError)
# After these a job is tried again, later or elsewhere.
REQUEUED_ERRORS = (UnavailableError, *_OF_THIS_MACHINE)


@contextmanager
def attempt(context: WorkerContext, lease: Lease) -> Iterator[LeaseHeartbeat]:
    """Renew a lease for as long as the block runs; an error of the block ends the attempt and is not raised.

    A lost lease changes nothing, `REQUEUED_ERRORS` put the job back in the queue, all others fail it.
    """
    log = _log.bind(job_id=lease.job_id, epoch=lease.fencing_token)
    try:
        try:
            with _full_disk_named(), lease_heartbeat(context, lease) as heartbeat:
                yield heartbeat
        except (LeaseLostError, *REQUEUED_ERRORS):
            raise
        except LuthierError as error:
            log.info("attempt failed", code=error.code)
            with context.database.transaction() as session:
                leases.fail(session, lease, error)
    except LeaseLostError:
        log.info("the job is no longer ours")
    except REQUEUED_ERRORS as error:
        requeue(context, lease, error)


@contextmanager
def _full_disk_named() -> Iterator[None]:
    """Turn a disk of this machine that has no room left into the error that says so."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise StorageFullError("The worker's disk is full; the operator must make room.") from error


def requeue(context: WorkerContext, lease: Lease, error: LuthierError) -> None:
    """Put a job back in the queue, to be tried later; a pausing one is paused."""
    try:
        with context.database.transaction() as session:
            leases.put_off(
                session,
                lease,
                error,
                pause_seconds=context.settings.sweep_seconds,
                is_machine=isinstance(error, _OF_THIS_MACHINE),
            )
    except UnavailableError:
        # The database itself is away: the lease runs out, and the worker that reaches it then continues.
        _log.warning("not given back, the database is away", job_id=lease.job_id)
    except LeaseLostError:
        _log.info("the job is no longer ours", job_id=lease.job_id)
