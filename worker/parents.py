"""Fetching the tuned models that a job builds on into its run directory, verified."""

from collections.abc import Mapping
from pathlib import Path

from luthier.core.errors import UnsuitableParentError
from luthier.storage.store import Storage
from services.parents import StoredArtifact


def fetch_parents(storage: Storage, artifacts: Mapping[str, StoredArtifact], run_dir: Path) -> dict[str, str]:
    """Copy what a job goes on from, and what that lies on, beside its rows.

    Args:
        storage: where artifacts are published.
        artifacts: `parent` and maybe `foundation`, as `services.parents.list_artifacts` returns them.
        run_dir: the run directory.

    Returns:
        `parent_path` and `foundation_path` of the run's inputs, each where there is one.

    Raises:
        ArtifactCorruptError: when stored bytes are missing or damaged.
        UnsuitableParentError: when a model's bytes are no longer those that the job was made with.
    """
    paths: dict[str, str] = {}
    fetched: dict[str, str] = {}
    for member, artifact in artifacts.items():
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
