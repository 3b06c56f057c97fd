"""TensorBoard: event files in a folder of the operator's, `tensorboard --logdir` of which shows every run."""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import Field

from luthier.core.settings import Settings
from luthier.trackers.base import RunStatus, TrackedRun, Tracker, TrackerConfig, TrackerRun

# Parts of a path: none may lead out of the folder.
FolderName = Annotated[str, Field(max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class TensorboardConfig(TrackerConfig):
    """`project` and `name` become folders, so they are of letters, digits, dots, dashes and underscores."""

    project: FolderName
    name: FolderName | None = None


class _Run(TrackerRun):
    def __init__(self, path_prefix: str) -> None:
        # Only where the tracker is used: the package is optional.
        from tensorboardX.event_file_writer import EventsWriter

        self._writer = EventsWriter(path_prefix, f".{os.getpid()}.{time.monotonic_ns()}")
        self._is_begun = False

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.proto.summary_pb2 import Summary

        now = time.time()
        if not self._is_begun:
            self._is_begun = True
            start = SessionLog(status=SessionLog.START)
            self._writer.write_event(Event(wall_time=now, step=step, session_log=start))
        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._writer.write_event(Event(wall_time=now, step=step, summary=Summary(value=values)))
        # A step is at least tens of milliseconds: who looks sees it now.
        self._writer.flush()

    def close(self, _status: RunStatus) -> None:
        self._writer.close()


class Tensorboard(Tracker):
    """Each attempt has a file of its own in the run's folder, which TensorBoard reads as one curve."""

    name = "tensorboard"
    Config = TensorboardConfig
    package = "tensorboardX"

    def missing_setting(self, settings: Settings) -> str | None:
        return None if settings.tensorboard_dir else "LUTHIER_TENSORBOARD_DIR"

    def open(self, config: TrackerConfig, run: TrackedRun, settings: Settings) -> TrackerRun:
        name = run.job_id if config.name is None else f"{config.name}-{run.job_id}"
        folder = Path(settings.tensorboard_dir) / run.project_id / config.project / name
        folder.mkdir(parents=True, exist_ok=True)
        return _Run(str(folder / "events"))


TRACKER = Tensorboard()
