"""The weights that a job builds on: its base model and tuned models, checked and fetched."""

from pathlib import Path

import structlog

from luthier.bases.catalogue import CatalogueEntry
from luthier.bases.fetch import ensure_base
from luthier.core.errors import ArtifactCorruptError, UnsuitableParentError
from luthier.core.specs import BaseFacts, TrainingSpec
from luthier.storage.store import Storage
from services.jobs import events, leases
from services.jobs.events import NewEvent
from services.jobs.leases import Lease
from services.models import continuation
from services.models.continuation import StoredArtifact
from worker.context import WorkerContext

_log = structlog.get_logger()


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
