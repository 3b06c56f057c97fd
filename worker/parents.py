"""Fetching the tuned models that a job builds on into its run directory, verified."""

from pathlib import Path

from luthier.core.errors import ArtifactCorruptError, UnsuitableParentError
from luthier.core.specs import TrainingSpec
from luthier.storage.store import Storage
from services import parents
from services.parents import StoredArtifact
from worker.context import WorkerContext


def fetch_parents(context: WorkerContext, spec: TrainingSpec, run_dir: Path) -> dict[str, str]:
    """Copy what a job goes on from, and what that lies on, beside its rows.

    Args:
        context: the worker's parts.
        spec: the job's.
        run_dir: the run directory.

    Returns:
        `parent_path` and `foundation_path` of the run's inputs, each where there is one.

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


def _look_up(context: WorkerContext, spec: TrainingSpec) -> dict[str, StoredArtifact]:
    with context.database.transaction() as session:
        return parents.list_artifacts(session, spec)


def _fetch(storage: Storage, stored: dict[str, StoredArtifact], run_dir: Path) -> dict[str, str]:
    paths: dict[str, str] = {}
    fetched: dict[str, str] = {}
    for member, artifact in stored.items():
        if artifact.digest not in fetched:
            folder = run_dir / member
            digest = storage.fetch_folder(artifact.key, folder).digest
            if digest != artifact.digest:
                raise UnsuitableParentError(
                    f"{artifact.name} is no longer what it was when the job was made: its digest is "
                    f"{digest}, and was {artifact.digest}. Make the job again."
                )
            fetched[artifact.digest] = str(folder)
        paths[f"{member}_path"] = fetched[artifact.digest]
    return paths
