"""Reading a job's specification, which another version of the service may have written."""

from importlib import metadata

import structlog
from pydantic import ValidationError

from db.tables import Job
from luthier.core.specs import TrainingSpec
from services.capacity import workers
from worker.context import WorkerContext

_log = structlog.get_logger()


class UnreadableSpecError(Exception):
    """A specification that this version can't read; raised within the claim, which is then undone."""

    def __init__(self, job_id: str, field: str) -> None:
        super().__init__(job_id)
        self.job_id = job_id
        self.field = field


def read_spec(job: Job) -> TrainingSpec:
    """Return a job's specification; raises UnreadableSpecError for one of an unknown version or field."""
    try:
        return TrainingSpec.model_validate(job.spec)
    except ValidationError as error:
        field = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise UnreadableSpecError(job.id, field) from error


def skip_unreadable(context: WorkerContext, error: UnreadableSpecError) -> None:
    """Leave a job to a newer worker: this one does not try it again, and the job says so."""
    context.unreadable.add(error.job_id)
    _log.warning("specification not readable, left to a newer worker", job_id=error.job_id, field=error.field)
    version = metadata.version("luthier")
    what = f"a newer worker: version {version} can't read {error.field} of its specification"
    with context.database.transaction() as session:
        workers.note_waiting(session, error.job_id, what)
