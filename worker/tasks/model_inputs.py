"""What a job was made with: its specification, its base model and tuned models, read, checked and fetched.

Another version of the service may have written the specification.
"""

from importlib import metadata
from pathlib import Path

import structlog
from pydantic import ValidationError

from db.tables import Job
from luthier.bases.catalogue import CatalogueEntry
from luthier.bases.fetch import ensure_base
from luthier.core.errors import ArtifactCorruptError, UnsuitableParentError
from luthier.core.specs import BaseFacts, TrainingSpec
from luthier.storage.store import Storage
from services.capacity import workers
from services.jobs import events, leases
from services.jobs.events import NewEvent
from services.jobs.leases import Lease
from services.models import continuation
from services.models.continuation import StoredArtifact
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


def fetch_parents(context: WorkerContext, spec: TrainingSpec, run_dir: Path) -> dict[str, str]:
    """Copy the model that a job continues, and the full model below it, into its run directory.

    Raises:
        ArtifactCorruptError: when stored bytes are missing or damaged.
        UnsuitableParentError: when a model's bytes are no longer those that the job was made with.
    """
    if spec.parent is None:
        return {}
    stored = _look_up(context, spec)
    try:
        return _fetch(context.storage, stored, run_dir)
    except ArtifactCorruptError:
        # A checkpoint that became its job's model meanwhile has moved.
        moved = _look_up(context, spec)
        if moved == stored:
            raise
    return _fetch(context.storage, moved, run_dir)


def check_parents(context: WorkerContext, spec: TrainingSpec, base: BaseFacts) -> None:
    """Check the manifests of the models that a job continues, before it takes a training slot.

    Raises:
        ArtifactCorruptError: when an artifact is not in storage.
        UnsuitableParentError: when it is another than the job was made with, or was tuned on other weights.
    """
    if spec.parent is None:
        return
    expected_digest = base.digest
    # Sorted by member, so that the weights below come before the parent.
    for _, artifact in sorted(_look_up(context, spec).items()):
        manifest = context.storage.read_manifest(artifact.key)
        _check_digest(artifact, manifest.digest)
        if artifact.digest == expected_digest:
            continue
        if manifest.base_digest != expected_digest:
            raise UnsuitableParentError(
                f"{artifact.name} was tuned on other weights ({manifest.base_digest}) than those that are "
                f"here now ({expected_digest}). Start from the base."
            )
        expected_digest = artifact.digest


def _check_digest(artifact: StoredArtifact, digest: str) -> None:
    if digest != artifact.digest:
        raise UnsuitableParentError(
            f"{artifact.name} is no longer what it was when the job was made: its digest is {digest}, and "
            f"was {artifact.digest}. Make the job again."
        )


def _look_up(context: WorkerContext, spec: TrainingSpec) -> dict[str, StoredArtifact]:
    with context.database.transaction() as session:
        return continuation.list_artifacts(session, spec)


def _fetch(storage: Storage, stored: dict[str, StoredArtifact], run_dir: Path) -> dict[str, str]:
    paths: dict[str, str] = {}
    fetched: dict[str, str] = {}
    for member, artifact in stored.items():
        if artifact.digest not in fetched:
            folder = run_dir / member
            _check_digest(artifact, storage.fetch_folder(artifact.key, folder).digest)
            fetched[artifact.digest] = str(folder)
        paths[f"{member}_path"] = fetched[artifact.digest]
    return paths


def ensure_jobs_base(context: WorkerContext, lease: Lease, entry: CatalogueEntry) -> BaseFacts:
    """Fetch a job's base model to this machine, with an event, unless it is there."""
    is_announced = False

    def announce(stage: str) -> None:
        nonlocal is_announced
        _log.info("base", stage=stage)
        if is_announced:
            return
        is_announced = True
        message = f"Fetching the base model {entry.id}, which this machine does not have yet"
        with context.database.transaction() as session:
            leases.hold(session, lease)
            events.append(session, lease.job_id, [NewEvent(message, data={})])

    return ensure_base(entry, context.settings.bases_dir, log=announce)
