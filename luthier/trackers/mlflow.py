"""MLflow, by its official package (`pip install 'luthier[mlflow]'` on the workers).

The experiment's name is PROJECT_ID/`project`. Credentials are MLflow's own variables (MLFLOW_TRACKING_TOKEN
and its kin) in the worker's environment.
"""

import importlib
import time
from collections.abc import Mapping
from typing import Any

from luthier.core.settings import Settings
from luthier.trackers.base import RunStatus, Tags, TrackedRun, Tracker, TrackerConfig, TrackerRun

_JOB_TAG = "luthier.job_id"
_STATUS: dict[RunStatus, str] = {
    "succeeded": "FINISHED",
    "failed": "FAILED",
    "cancelled": "KILLED",
}


class MlflowConfig(TrackerConfig):
    tags: Tags | None = None


class _Run(TrackerRun):
    def __init__(self, client: Any, run_id: str) -> None:
        self._client = client
        self._run_id = run_id

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        entities = importlib.import_module("mlflow.entities")
        now = time.time_ns() // 1_000_000
        measured = [entities.Metric(name, value, now, step) for name, value in metrics.items()]
        self._client.log_batch(self._run_id, metrics=measured)

    def close(self, status: RunStatus) -> None:
        # An interrupted run stays running: another worker continues it.
        if status in _STATUS:
            self._client.set_terminated(self._run_id, _STATUS[status])


class Mlflow(Tracker):
    """A run has the job's id as a tag, by which a later attempt finds it."""

    name = "mlflow"
    Config = MlflowConfig
    package = "mlflow"

    def missing_setting(self, settings: Settings) -> str | None:
        return None if settings.mlflow_tracking_uri else "LUTHIER_MLFLOW_TRACKING_URI"

    def open(self, config: TrackerConfig, run: TrackedRun, settings: Settings) -> TrackerRun:
        assert isinstance(config, MlflowConfig)
        # By name: the package is optional, and this file is named like it.
        client = importlib.import_module("mlflow").MlflowClient(tracking_uri=settings.mlflow_tracking_uri)
        # Experiments of different projects never share a name.
        name = f"{run.project_id}/{config.project}"
        experiment = client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment else client.create_experiment(name)
        earlier = client.search_runs([experiment_id], f"tags.`{_JOB_TAG}` = '{run.job_id}'", max_results=1)
        if earlier:
            return _Run(client, earlier[0].info.run_id)
        tags = {_JOB_TAG: run.job_id, "luthier.base": run.base_id, "luthier.project_id": run.project_id}
        # MLflow's tags have values; a client's are words.
        tags |= {f"tag.{tag}": "" for tag in config.tags or []}
        started = client.create_run(experiment_id, run_name=config.name or run.job_id, tags=tags)
        for name, value in run.parameters.items():
            client.log_param(started.info.run_id, name, value)
        return _Run(client, started.info.run_id)


TRACKER = Mlflow()
