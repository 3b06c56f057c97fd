"""Limits of a project: its waiting jobs, stored bytes and open uploads; not what a request costs to compute.

Each is counted under a lock of the project that is held until the transaction ends, so that requests that
arrive together can't pass together.
"""

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from db.queries import lock_key
from db.tables import File, Job
from db.upload_tables import Upload
from luthier.core.errors import TooLargeError, TooManyRequestsError
from luthier.core.states import JobStatus
from services.uploads import UploadStatus

_WAITING = (JobStatus.VALIDATING_FILES, JobStatus.QUEUED, JobStatus.PAUSED)


def check_queued_jobs(session: Session, project_id: str, limit: int) -> None:
    """Refuse one more job when as many wait as may.

    Raises:
        TooManyRequestsError: when the project is at its limit.
    """
    lock_key(session, f"{project_id} queued jobs")
    num_waiting = session.scalar(
        select(func.count()).where(
            Job.project_id == project_id, Job.status.in_(_WAITING), Job.deleted_at.is_(None)
        )
    )
    if (num_waiting or 0) >= limit:
        raise TooManyRequestsError(
            f"This project has {num_waiting} jobs that wait or are paused, and the limit is {limit}; wait for"
            " one to run, cancel one, or ask the operator to raise LUTHIER_MAX_QUEUED_JOBS_PER_PROJECT."
        )


def check_open_uploads(session: Session, project_id: str, limit: int) -> None:
    """Refuse one more upload in parts when as many are open as may be.

    Raises:
        TooManyRequestsError: when the project is at its limit.
    """
    lock_key(session, f"{project_id} open uploads")
    num_open = session.scalar(
        select(func.count()).where(
            Upload.project_id == project_id,
            Upload.status == UploadStatus.PENDING.value,
            Upload.expires_at > func.now(),
        )
    )
    if (num_open or 0) >= limit:
        raise TooManyRequestsError(
            f"This project has {num_open} uploads that are not completed, and the limit is {limit}; complete"
            " or cancel one, or ask the operator to raise LUTHIER_MAX_RUNNING_UPLOADS_PER_PROJECT."
        )


def check_stored_bytes(session: Session, project_id: str, limit: int, *, num_new_bytes: int) -> None:
    """Refuse bytes beyond the limit of the project's files; what open uploads declared counts too.

    Args:
        limit: in bytes; 0 means none.
        num_new_bytes: of what is to be stored.

    Raises:
        TooLargeError: when they do not fit.
    """
    if limit == 0:
        return
    lock_key(session, f"{project_id} stored bytes")
    files = select(func.coalesce(func.sum(File.num_bytes), 0)).where(
        File.project_id == project_id, File.deleted_at.is_(None)
    )
    declared = select(func.coalesce(func.sum(Upload.num_bytes), 0)).where(
        Upload.project_id == project_id,
        Upload.status == UploadStatus.PENDING.value,
        Upload.expires_at > func.now(),
    )
    num_stored = session.scalar(select(files.scalar_subquery() + declared.scalar_subquery())) or 0
    if num_stored + num_new_bytes > limit:
        raise TooLargeError(
            f"This project's files and open uploads have {num_stored} bytes, and the limit is {limit}; delete"
            " files, cancel uploads, or ask the operator to raise LUTHIER_MAX_STORED_BYTES_PER_PROJECT.",
            param="file",
        )
