"""Writes the model in memory to folders: checkpoints, which the worker takes away, and the result."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch

from luthier.core.events import CheckpointEvent, Metrics
from luthier.core.specs import Canary
from luthier.modeling.training_protocols import Batch
from luthier.storage.manifests import Manifest
from luthier.training.job import Job
from luthier.training.model.training_model import JobModel
from luthier.training.output.artifact import take_over_artifact, write_artifact
from luthier.training.output.hardlink import link_folder, unpack_folder
from luthier.training.output.verification import check_artifact, record_canary
from luthier.training.process_io import EventWriter


@dataclass
class Publisher:
    """Writes artifact folders of one run.

    A checkpoint's folder belongs to its reader, who removes it. Where a checkpoint other than the last may
    become the result, the chosen one is kept beside, and in every save point: its weights are gone from
    memory by then. `samples` are rows on which results are verified before anything is published,
    `general_ids` tokens of the bundled general text, for the canary.
    """

    job: Job
    model: JobModel
    writer: EventWriter
    samples: list[Batch]
    general_ids: list[int]
    log: Path
    # The last step that was verified, with what the model says: its parameters are the same until the next.
    _verified: tuple[int, Canary] | None = field(default=None, init=False)

    @property
    def _chosen(self) -> Path:
        return self.job.folder / "chosen"

    @property
    def chosen_folder(self) -> Path | None:
        """The chosen checkpoint's folder, where the run keeps one and has chosen."""
        return self._chosen if self._chosen.exists() else None

    def checkpoint_folder(self, step: int) -> Path:
        return self.job.folder / "checkpoints" / f"step-{step:06d}"

    def write_checkpoint(self, step: int, metrics: Metrics, *, is_chosen: bool) -> Manifest:
        """Write the model as it is under its step, and say so.

        Args:
            is_chosen: whether it would be the result if training ended now.

        Raises:
            SelfCheckError: when the model that was trained is not the one that would be published.
        """
        folder = self.checkpoint_folder(step)
        manifest = self._write(folder, step, metrics)
        options = self.job.spec.training
        if is_chosen and (options.keep_best or options.max_forgetting is not None):
            self._check(folder)
            shutil.rmtree(self._chosen, ignore_errors=True)
            link_folder(folder, self._chosen)
        self.writer.emit(
            CheckpointEvent(
                job_id=self.writer.job_id,
                step=step,
                path=folder.relative_to(self.job.folder).as_posix(),
                digest=manifest.digest,
                metrics=metrics,
            )
        )
        return manifest

    def write_result(self, folder: Path, step: int, metrics: Metrics) -> Manifest:
        """Make the model as it is now the result, once it is verified.

        Raises:
            SelfCheckError: when what was saved is not what was trained.
        """
        manifest = self._write(folder, step, metrics)
        self._check(folder)
        return manifest

    def take_chosen(self, folder: Path, step: int, metrics: Metrics) -> Manifest:
        """Make the chosen checkpoint, verified when it was chosen, the result."""
        return take_over_artifact(
            self._chosen, folder, self.model, self.job.origin, step=step, metrics=metrics
        )

    def restore_chosen(self, kept: Path | None) -> None:
        """Put back the chosen checkpoint as a save point holds it, or none."""
        shutil.rmtree(self._chosen, ignore_errors=True)
        if kept is not None and kept.exists():
            unpack_folder(kept, self._chosen)

    def _write(self, folder: Path, step: int, metrics: Metrics) -> Manifest:
        if self._verified is None or self._verified[0] != step:
            self.model.verify(self.samples)
            self._verified = step, record_canary(self.model, self.general_ids)
        return write_artifact(
            folder,
            self.model,
            self.job.origin,
            step=step,
            metrics=metrics,
            log=self.log,
            canary=self._verified[1],
        )

    def _check(self, folder: Path) -> None:
        # Loading may draw random numbers; the steps after it must draw theirs as if it had not happened.
        with torch.random.fork_rng():
            check_artifact(self.model, folder, self.samples[0])
