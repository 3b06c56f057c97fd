"""The base of a job on this machine: fetched first where it is not there, which the job tells."""

import structlog

from luthier.bases.catalogue import CatalogueEntry
from luthier.bases.fetch import ensure_base
from luthier.core.specs import BaseFacts
from services.jobs import events, leases
from services.jobs.events import NewEvent
from services.jobs.leases import Lease
from worker.context import WorkerContext

_log = structlog.get_logger()


def ensure_jobs_base(context: WorkerContext, lease: Lease, entry: CatalogueEntry) -> BaseFacts:
    """Have a job's base on this machine.

    Raises:
        BaseUnavailableError: when the base can't be fetched; the message says what to do.
    """
    is_told = False

    def tell(stage: str) -> None:
        nonlocal is_told
        _log.info("base", stage=stage)
        if is_told:
            return
        is_told = True
        message = f"Fetching the base model {entry.id}, which this machine does not have yet"
        with context.database.transaction() as session:
            leases.hold(session, lease)
            events.append(session, lease.job_id, [NewEvent(message, data={})])

    return ensure_base(entry, context.settings.bases_dir, log=tell)
