"""Jobs for clients: create, read, list, cancel. What workers do is in services/jobs/leases.py."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

from sqlalchemy import Select, func, select
from sqlalchemy.orm import Session

from db.queries import find_cursor, find_owned, page
from db.tables import Base, Checkpoint, File, Job, JobEvent, Model, Worker
from luthier.bases.catalogue import Catalogue, base_folder, find_base_facts
from luthier.core.errors import (
    InvalidFilePurposeError,
    InvalidTransitionError,
    InvalidValueError,
    ModelNotAvailableError,
    NotFoundError,
    TooFewRowsError,
    UnsupportedValueError,
)
from luthier.core.ids import new_id
from luthier.core.settings import Settings
from luthier.core.shapes import read_shape
from luthier.core.specs import (
    MIN_TRAINING_ROWS,
    DpoOptions,
    Hyperparameters,
    TrainingOptions,
    TrainingSpec,
)
from luthier.core.states import JobStatus, check_transition
from luthier.data.prepare.objectives import Purpose, learns_from, wrong_format_message
from luthier.methods._tuning import parse_tuning, resolve_spec
from luthier.trackers import check_integrations, discover
from services.accounts import limits
from services.accounts.auth import Principal
from services.capacity import workers
from services.files import files
from services.jobs import attempts, events
from services.jobs.events import NewEvent
from services.models import continuation
from services.task_queue import Notify, notify_after_commit
from services.webhooks import deliveries

# A worker without a heartbeat for this long is not counted.
_TRACKER_WORKER_ALIVE = timedelta(minutes=1)


@dataclass(frozen=True)
class NewJob:
    """A request for a job, with the right types; `tuning` is not yet checked by its method.

    A `tuning` without a type is LoRA, or that of the tuned model that the job continues.
    """

    model: str
    training_file_id: str
    seed: int
    validation_file_id: str | None = None
    suffix: str | None = None
    hyperparameters: Hyperparameters = field(default_factory=Hyperparameters)
    tuning: dict[str, Any] = field(default_factory=dict)
    training: TrainingOptions = field(default_factory=TrainingOptions)
    dpo: DpoOptions | None = None
    metadata: dict[str, str] | None = None
    # Checked by services.jobs.integrations before a job is made of it.
    integrations: Sequence[dict[str, Any]] = ()


def _get_input_file(
    session: Session, principal: Principal, file_id: str, purpose: Purpose, *, wants_pairs: bool
) -> File:
    param = f"{purpose}_file"
    try:
        row = files.get(session, principal, file_id, param=param, for_share=True)
    except NotFoundError as error:
        # OpenAI answers 400 for a file named in a body; 404 is for what the path names.
        raise InvalidValueError(f"{param}: {error.message}", param=param) from error
    if row.purpose != "fine-tune":
        raise InvalidFilePurposeError(
            f"{param}: {file_id} has purpose {row.purpose!r}; upload it with purpose 'fine-tune'.",
            param=param,
        )
    if row.row_format is not None and not learns_from(row.row_format, wants_pairs=wants_pairs):
        raise InvalidValueError(f"{param}: {wrong_format_message(purpose, row.row_format)}", param=param)
    return row


def _check_validation_is_there(request: NewJob) -> None:
    """Refuse options that decide by the validation loss where there will be none."""
    if request.validation_file_id is not None or request.training.validation_split > 0:
        return
    for name in ("patience", "keep_best"):
        if getattr(request.training, name):
            raise InvalidValueError(
                f"training.{name}: it goes by the validation loss; send a validation_file or set "
                "training.validation_split.",
                param=f"training.{name}",
            )


@dataclass(frozen=True)
class CheckedJob:
    """A request that would make a job: its spec, yet with "auto" in it, and its files."""

    spec: TrainingSpec
    training_file: File
    validation_file: File | None


def _check_base_is_fetched(session: Session, settings: Settings, base_id: str) -> None:
    """Refuse a base that no machine has, unless workers may fetch bases for jobs."""
    is_fetched = (
        settings.fetch_on_demand
        or find_base_facts(settings.bases_dir, base_id) is not None
        or session.get(Base, base_id) is not None
        or workers.has_fetched(session, base_id)
    )
    if not is_fetched:
        raise ModelNotAvailableError(
            f"model: no machine of this service has fetched {base_id}, and workers fetch no base for a job "
            f"here. Operator: luthier bases fetch {base_id}, or set LUTHIER_FETCH_ON_DEMAND.",
            param="model",
        )


def _check_fits_base(settings: Settings, spec: TrainingSpec, training_file: File) -> None:
    """Refuse a tuning that does not fit the base's layers, where the base's files are on this machine."""
    base = find_base_facts(settings.bases_dir, spec.base_id)
    if base is None:
        return
    # The numbers that "auto" becomes do not decide whether the layers exist.
    resolved = resolve_spec(
        spec, base=base, num_rows=training_file.num_rows, num_tokens=training_file.num_bytes, num_threads=1
    )
    method, params = parse_tuning(resolved.tuning)
    method.cost(params, read_shape(base_folder(settings.bases_dir, base.id)))


def check(
    session: Session, principal: Principal, catalogue: Catalogue, settings: Settings, request: NewJob
) -> CheckedJob:
    """Check what can be checked of a request without reading its rows; nothing is stored.

    Raises:
        ModelNotAvailableError: when the base is unknown, or no machine has it.
        InvalidRequestError: when a file is unknown, has another purpose, rows of the wrong kind or too few
            of them, or when a parameter of the method is wrong; names the field.
    """
    origin = continuation.find_origin(session, principal, catalogue, request.model, request.tuning)
    _check_base_is_fetched(session, settings, origin.base_id)
    wants_pairs = request.dpo is not None
    training_file = _get_input_file(
        session, principal, request.training_file_id, "training", wants_pairs=wants_pairs
    )
    if training_file.num_rows < MIN_TRAINING_ROWS:
        raise TooFewRowsError(
            f"training_file: {training_file.id} has {training_file.num_rows} rows, and a job needs at least "
            f"{MIN_TRAINING_ROWS}; 50 to 100 well-made ones are a good start.",
            param="training_file",
        )
    validation_file = None
    if request.validation_file_id is not None:
        validation_file = _get_input_file(
            session, principal, request.validation_file_id, "validation", wants_pairs=wants_pairs
        )
        if request.training.validation_split > 0:
            raise InvalidValueError(
                "training.validation_split: leave it out when validation_file is given.",
                param="training.validation_split",
            )
    _check_validation_is_there(request)
    spec = TrainingSpec(
        base_id=origin.base_id,
        tuning=origin.tuning,
        hyperparameters=request.hyperparameters,
        training=request.training,
        dpo=request.dpo,
        seed=request.seed,
        parent=origin.parent,
        foundation=origin.full_model,
    )
    _check_fits_base(settings, spec, training_file)
    return CheckedJob(spec, training_file, validation_file)


def create(
    session: Session,
    principal: Principal,
    catalogue: Catalogue,
    settings: Settings,
    notify: Notify,
    request: NewJob,
) -> Job:
    """Make a job in `validating_files` and notify a worker once it is committed.

    Raises:
        ModelNotAvailableError: when the base is unknown.
        InvalidRequestError: when `check` refuses it.
        TooManyRequestsError: when as many jobs of the project wait as may.
    """
    checked = check(session, principal, catalogue, settings, request)
    limits.check_queued_jobs(session, principal.project_id, settings.max_queued_jobs_per_project)
    training_file = checked.training_file
    job = Job(
        id=new_id("job"),
        **principal.owner_columns(),
        status=JobStatus.VALIDATING_FILES.value,
        model=request.model,
        base_id=checked.spec.base_id,
        parent_model_id=None if checked.spec.parent is None else checked.spec.parent.model_id,
        spec=checked.spec.model_dump(mode="json"),
        training_file_id=training_file.id,
        validation_file_id=request.validation_file_id,
        suffix=request.suffix,
        seed=request.seed,
        user_metadata=request.metadata,
        integrations=list(request.integrations) or None,
    )
    session.add(job)
    session.flush()
    validating = f"Validating training file: {training_file.id}"
    if request.validation_file_id is not None:
        validating += f" and validation file: {request.validation_file_id}"
    events.append(
        session,
        job.id,
        [NewEvent(f"Created fine-tuning job: {job.id}", data={}), NewEvent(validating, data={})],
    )
    notify_after_commit(session, notify, job.id)
    return job


def get(session: Session, principal: Principal, job_id: str, *, for_update: bool = False) -> Job:
    job = find_owned(session, Job, principal.project_id, job_id, for_update=for_update)
    if job is None:
        raise NotFoundError(
            f"Could not find fine tune: {job_id[:64]} in the project of this key", param="fine_tuning_job_id"
        )
    return job


def list_(
    session: Session,
    principal: Principal,
    *,
    after: str | None,
    limit: int,
    metadata: dict[str, str] | None,
    has_no_metadata: bool = False,
) -> tuple[Sequence[Job], bool]:
    """Return a page of the project's jobs, newest first, and whether more follow."""
    filters = [Job.user_metadata.contains(metadata)] if metadata else []
    if has_no_metadata:
        filters.append(Job.user_metadata.is_(None))
    is_listed = Job.project_id == principal.project_id
    return page(session, Job, is_listed, *filters, after=after, limit=limit)


def list_events(
    session: Session, principal: Principal, job_id: str, *, after: str | None, limit: int
) -> tuple[Sequence[JobEvent], bool]:
    """Return a page of a job's events, newest first, and whether more follow."""
    job = get(session, principal, job_id)
    statement: Select[Any] = select(JobEvent).where(JobEvent.job_id == job.id)
    cursor = find_cursor(session, JobEvent, after, JobEvent.job_id == job.id)
    if cursor is not None:
        statement = statement.where(JobEvent.seq < cursor.seq)
    rows = session.scalars(statement.order_by(JobEvent.seq.desc()).limit(limit + 1)).all()
    return rows[:limit], len(rows) > limit


def list_checkpoints(
    session: Session, principal: Principal, job_id: str, *, after: str | None, limit: int
) -> tuple[Sequence[tuple[Checkpoint, str]], bool]:
    """Return a page of a job's checkpoints with their models' names, highest step first."""
    job = get(session, principal, job_id)
    statement = (
        select(Checkpoint, Model.name)
        .join(Model, Model.id == Checkpoint.model_id)
        .where(Checkpoint.job_id == job.id, Checkpoint.deleted_at.is_(None))
    )
    cursor = find_cursor(session, Checkpoint, after, Checkpoint.job_id == job.id)
    if cursor is not None:
        statement = statement.where(Checkpoint.step_number < cursor.step_number)
    rows = session.execute(statement.order_by(Checkpoint.step_number.desc()).limit(limit + 1)).all()
    return [(row[0], row[1]) for row in rows[:limit]], len(rows) > limit


def cancel(session: Session, principal: Principal, job_id: str) -> Job:
    """End an unfinished job at once; its worker sees it within a second and kills the training process."""
    job = get(session, principal, job_id, for_update=True)
    try:
        check_transition(JobStatus(job.status), JobStatus.CANCELLED)
    except InvalidTransitionError as error:
        raise InvalidTransitionError(
            f"Job {job.id} has already ended with status {job.status}, so it can't be cancelled."
        ) from error
    if job.lease_owner is not None:
        attempts.end(session, job.id, job.lease_epoch, "cancelled")
    job.status = JobStatus.CANCELLED.value
    job.finished_at = func.now()
    job.estimated_finish_at = None
    session.flush()
    deliveries.enqueue(session, job.id, JobStatus.CANCELLED)
    events.append(session, job.id, [NewEvent("The job was cancelled", data={})])
    return job


def with_checked_integrations(session: Session, settings: Settings, request: NewJob) -> NewJob:
    """Return the request with its integrations checked: well-formed, set up, and installed on a worker."""
    if not request.integrations:
        return request
    found = check_integrations(request.integrations, settings)
    for index, integration in enumerate(found):
        _check_installed(session, integration["type"], f"integrations.{index}.type")
    return replace(request, integrations=found)


def _check_installed(session: Session, name: str, param: str) -> None:
    if discover()[name].package is None:
        return
    facts = session.scalars(
        select(Worker.facts).where(Worker.heartbeat_at > func.now() - _TRACKER_WORKER_ALIVE)
    ).all()
    reported = [found["trackers"] for found in facts if "trackers" in found]
    # Where no worker lives, nothing is known; the one that comes may have it.
    if reported and not any(name in trackers for trackers in reported):
        raise UnsupportedValueError(
            f"{param}: no worker has the package of {name}. Operator: pip install 'luthier[{name}]' there.",
            param=param,
        )
