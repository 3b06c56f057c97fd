"""Weights & Biases, by its official package (`pip install 'luthier[wandb]'` on the workers)."""

import importlib
import os
import tempfile
from collections.abc import Mapping
from typing import Any

from luthier.core.errors import UnsupportedValueError
from luthier.core.settings import Settings
from luthier.trackers.base import RunStatus, Tags, Text, TrackedRun, Tracker, TrackerConfig, TrackerRun


class WandbConfig(TrackerConfig):
    """OpenAI's members: `project`, `entity`, `name`, `tags`."""

    entity: Text | None = None
    tags: Tags | None = None


class _Run(TrackerRun):
    def __init__(self, run: Any, scratch: "tempfile.TemporaryDirectory[str] | None") -> None:
        self._run = run
        self._scratch = scratch

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self, status: RunStatus) -> None:
        self._run.finish(exit_code=0 if status in ("succeeded", "interrupted") else 1)
        if self._scratch is not None:
            self._scratch.cleanup()


class Wandb(Tracker):
    """Runs have the job's id, so that a later attempt continues the same one."""

    name = "wandb"
    Config = WandbConfig
    package = "wandb"

    def missing_setting(self, settings: Settings) -> str | None:
        return None if settings.wandb_api_key.get_secret_value() else "LUTHIER_WANDB_API_KEY"

    def check(self, config: TrackerConfig, settings: Settings, at: str) -> None:
        assert isinstance(config, WandbConfig)
        if config.entity not in (None, settings.wandb_entity):
            raise UnsupportedValueError(
                f"{at}.entity: runs go to the operator's own entity (LUTHIER_WANDB_ENTITY); leave it out.",
                param=f"{at}.entity",
            )

    def open(self, config: TrackerConfig, run: TrackedRun, settings: Settings) -> TrackerRun:
        assert isinstance(config, WandbConfig)
        # By name: the package is optional, and this folder is named like it.
        wandb = importlib.import_module("wandb")
        extra = {"base_url": settings.wandb_base_url} if settings.wandb_base_url else {}
        # It keeps a copy of each run in the working folder, for ever, unless its own variable names another.
        kept = os.environ.get("WANDB_DIR")
        scratch = None if kept else tempfile.TemporaryDirectory(prefix="luthier-wandb-")
        started = wandb.init(
            # W&B's names have no slash. Projects of different tenants never share a name.
            project=f"{run.project_id}-{config.project}",
            # The operator's, whose key it is; a job may repeat it and name no other.
            entity=settings.wandb_entity or None,
            name=config.name or run.job_id,
            tags=[*run.tags, *(config.tags or [])],
            id=run.job_id,
            resume="allow",
            # Several jobs may be followed by one process.
            reinit="create_new",
            config=dict(run.parameters),
            dir=kept if scratch is None else scratch.name,
            # Neither the worker's output nor facts of its machine leave the house.
            settings=wandb.Settings(
                api_key=settings.wandb_api_key.get_secret_value(),
                console="off",
                silent=True,
                disable_git=True,
                disable_code=True,
                x_disable_stats=True,
                x_disable_meta=True,
                **extra,
            ),
        )
        return _Run(started, scratch)


TRACKER = Wandb()
