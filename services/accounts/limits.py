"""Limits of a project: waiting jobs, stored bytes, open uploads and pinned models.

Each is counted under a lock of the project, held until the transaction ends, so that concurrent requests
can't pass a limit together.
"""

from collections.abc import Mapping

from sqlalchemy import BigInteger, String, bindparam, func, select
from sqlalchemy.orm import Session, aliased

from db.queries import lock_key
from db.tables import File, Job, Model, Upload
from luthier.core.errors import PinLimitError, TooLargeError, TooManyRequestsError
from luthier.core.states import JobStatus
from luthier.methods import discover
from services.files.uploads import UploadStatus

# Written into the statement: PostgreSQL uses a partial index only by constants.
_WAITING = bindparam(
    "waiting",
    [JobStatus.VALIDATING_FILES.value, JobStatus.QUEUED.value, JobStatus.PAUSED.value],
    String,
    expanding=True,
    literal_execute=True,
)


def check_queued_jobs(session: Session, project_id: str, limit: int) -> None:
    """Refuse one more job when the limit of waiting jobs is reached."""
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
    """Refuse one more upload when the limit of open uploads is reached."""
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
    """Refuse bytes beyond the project's limit (0: none); what open uploads declared counts too."""
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


def check_pinned_bytes(session: Session, model: Model, room_bytes: Mapping[str, int], share: float) -> None:
    """Refuse a model, pinned just now, with which the project's pins exceed their share of memory."""
    lock_key(session, f"{model.project_id} pinned models")
    weights = aliased(Model)
    num_bytes = Job.report["run"]["artifact_bytes"].astext.cast(BigInteger)
    pinned = session.execute(
        select(Model.id, weights.method, func.coalesce(num_bytes, 0))
        # An adapter on a fully tuned model has a copy of that one's weights.
        .join(weights, weights.id == func.coalesce(Model.full_model_id, Model.id))
        .join(Job, Job.id == weights.job_id)
        .where(Model.project_id == model.project_id, Model.pinned_at.is_not(None), Model.deleted_at.is_(None))
    ).all()
    methods = discover()
    own = next(method for model_id, method, _ in pinned if model_id == model.id)
    is_whole = methods[own].is_whole_model
    kind, setting = ("whole", "WHOLE_MODELS") if is_whole else ("packed", "ADAPTERS")
    if kind not in room_bytes:
        return
    limit = int(share * room_bytes[kind])
    sizes = {
        model_id: size for model_id, method, size in pinned if methods[method].is_whole_model is is_whole
    }
    if sum(sizes.values()) > limit:
        raise PinLimitError(
            f"{model.name} has {sizes.pop(model.id)} bytes and the project's other pinned models of its kind "
            f"have {sum(sizes.values())}; one project may pin {limit} bytes. Unpin another one, or ask the "
            f"operator to raise LUTHIER_MAX_PINNED_SHARE or LUTHIER_INFERENCE_MAX_{setting}_BYTES.",
            param="model",
        )
