"""Giving a job back when a part of the service is away: nobody's crash, and nothing is lost."""

import structlog

from luthier.core.errors import LuthierError, UnavailableError
from services import leases
from services.events import NewEvent
from services.leases import Lease, LeaseLostError
from worker.context import WorkerContext

_log = structlog.get_logger()


def give_back(context: WorkerContext, lease: Lease, error: LuthierError) -> None:
    """Let a job wait for a better time; one that was asked to pause is paused.

    Args:
        error: what is away; users are told.
    """
    told = NewEvent(f"The job waits: {error.message}", level="warn", data={})
    try:
        with context.database.transaction() as session:
            leases.wait_again(session, lease, outcome="unavailable", event=told)
    except UnavailableError:
        # The database itself is away: the lease runs out, and whoever reaches it then goes on.
        _log.warning("not given back, the database is away", job_id=lease.job_id)
    except LeaseLostError:
        _log.info("the job is no longer ours", job_id=lease.job_id)
    # What is away is not asked again at once.
    context.stopping.wait(context.settings.sweep_seconds)
