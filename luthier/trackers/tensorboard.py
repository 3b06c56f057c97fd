"""TensorBoard: event files in a folder of the operator's, `tensorboard --logdir` of which shows every run."""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, BinaryIO

from pydantic import Field

from luthier.core.settings import Settings
from luthier.trackers._event_file import record, scalars_event, start_event, version_event
from luthier.trackers.base import RunStatus, TrackedRun, Tracker, TrackerConfig, TrackerRun

# Parts of a path: none may lead out of the folder.
FolderName = Annotated[str, Field(max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class TensorboardConfig(TrackerConfig):
    """`project` and `name` become folders, so they are of letters, digits, dots, dashes and underscores."""

    project: FolderName
    name: FolderName | None = None


class _Run(TrackerRun):
    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._is_begun = False

    def _write(self, data: bytes) -> None:
        self._file.write(record(data))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        now = time.time()
        if not self._is_begun:
            self._is_begun = True
            self._write(version_event(now))
            self._write(start_event(now, step))
        self._write(scalars_event(now, step, metrics))
        # A step is at least tens of milliseconds: who looks sees it now.
        self._file.flush()

    def close(self, _status: RunStatus) -> None:
        self._file.close()


class Tensorboard(Tracker):
    """Each attempt has a file of its own in the run's folder, which TensorBoard reads as one curve."""

    name = "tensorboard"
    Config = TensorboardConfig

    def missing_setting(self, settings: Settings) -> str | None:
        return None if settings.tensorboard_dir else "LUTHIER_TENSORBOARD_DIR"

    def open(self, config: TrackerConfig, run: TrackedRun, settings: Settings) -> TrackerRun:
        name = run.job_id if config.name is None else f"{config.name}-{run.job_id}"
        folder = Path(settings.tensorboard_dir) / run.project_id / config.project / name
        folder.mkdir(parents=True, exist_ok=True)
        # The time is part of the name by convention, and puts the attempts' files in order.
        path = folder / f"events.out.tfevents.{time.time_ns() // 1000:018d}.{os.getpid()}"
        return _Run(path.open("xb"))


TRACKER = Tensorboard()
