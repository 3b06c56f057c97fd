"""wandb and MLflow as they are called, with stand-ins for their packages; the real ones are no dependency."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from pydantic import SecretStr

from luthier.core.settings import Settings
from luthier.trackers import discover
from luthier.trackers.base import TrackedRun

_RUN = TrackedRun("ftjob-1", "proj_1", "tiny", {"n_epochs": 2, "seed": 7})


def _module(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    module = ModuleType(name)
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)


def test_wandb_runs_have_the_jobs_id_and_send_nothing_of_the_machine(monkeypatch):
    monkeypatch.delenv("WANDB_DIR", raising=False)
    calls = Mock()
    calls.init.return_value = calls
    _module(monkeypatch, "wandb", init=calls.init, Settings=SimpleNamespace)
    tracker = discover()["wandb"]
    config = tracker.Config.model_validate({"project": "p", "entity": "e", "tags": ["mine"]})
    settings = Settings(
        _env_file=None,
        wandb_api_key=SecretStr("secret"),
        wandb_base_url="https://w.example",
        wandb_entity="e",
    )
    opened = tracker.open(config, _RUN, settings)
    opened.log(3, {"train_loss": 0.5})
    opened.close("failed")
    (_, _, begun), (_, (metrics,), at), (_, _, ended) = calls.mock_calls
    # Two tenants' projects of one name are separate.
    assert (begun["project"], begun["entity"]) == (f"{_RUN.project_id}-p", "e")
    assert begun["name"] == begun["id"] == "ftjob-1"
    assert begun["resume"] == "allow"
    assert begun["tags"] == ["luthier/finetune", "luthier/tiny", "luthier/ftjob-1", "mine"]
    assert begun["config"] == {"n_epochs": 2, "seed": 7}
    assert (begun["settings"].api_key, begun["settings"].base_url) == ("secret", "https://w.example")
    assert begun["settings"].console == "off"
    assert not Path(begun["dir"]).exists(), "nothing stays on the worker's disk"
    assert (metrics, at, ended) == ({"train_loss": 0.5}, {"step": 3}, {"exit_code": 1})


class FakeMlflowClient:
    """Experiments and runs in memory."""

    runs: dict[str, dict[str, Any]] = {}  # noqa: RUF012
    experiments: list[str] = []  # noqa: RUF012

    def __init__(self, tracking_uri: str) -> None:
        assert tracking_uri == "http://mlflow.example"

    def get_experiment_by_name(self, name: str) -> Any:
        return SimpleNamespace(experiment_id=name) if name in self.experiments else None

    def create_experiment(self, name: str) -> str:
        self.experiments.append(name)
        return name

    def search_runs(self, experiment_ids: list[str], wanted: str, max_results: int) -> list[Any]:
        found = [key for key, run in self.runs.items() if run["tags"]["luthier.job_id"] in wanted]
        return [SimpleNamespace(info=SimpleNamespace(run_id=key)) for key in found[:max_results]]

    def create_run(self, experiment_id: str, run_name: str, tags: dict[str, str]) -> Any:
        run_id = f"run-{len(self.runs)}"
        self.runs[run_id] = {"name": run_name, "tags": tags, "params": {}, "metrics": [], "status": "RUNNING"}
        return SimpleNamespace(info=SimpleNamespace(run_id=run_id))

    def log_param(self, run_id: str, name: str, value: Any) -> None:
        self.runs[run_id]["params"][name] = value

    def log_batch(self, run_id: str, metrics: list[Any]) -> None:
        self.runs[run_id]["metrics"] += metrics

    def set_terminated(self, run_id: str, status: str) -> None:
        self.runs[run_id]["status"] = status


def test_an_mlflow_run_is_gone_on_with_by_a_later_attempt(monkeypatch):
    monkeypatch.setattr(FakeMlflowClient, "runs", {})
    monkeypatch.setattr(FakeMlflowClient, "experiments", [])
    _module(monkeypatch, "mlflow", MlflowClient=FakeMlflowClient)
    _module(monkeypatch, "mlflow.entities", Metric=lambda *facts: facts)
    tracker = discover()["mlflow"]
    config = tracker.Config.model_validate({"project": "p", "name": "mine", "tags": ["a"]})
    settings = Settings(_env_file=None, mlflow_tracking_uri="http://mlflow.example")
    first = tracker.open(config, _RUN, settings)
    first.log(1, {"train_loss": 0.5})
    first.close("interrupted")
    (run,) = FakeMlflowClient.runs.values()
    assert (run["name"], run["status"], run["params"]) == ("mine", "RUNNING", {"n_epochs": 2, "seed": 7})
    second = tracker.open(config, _RUN, settings)
    second.log(2, {"train_loss": 0.25})
    second.close("succeeded")
    assert len(FakeMlflowClient.runs) == 1
    assert [(name, value, step) for name, value, _, step in run["metrics"]] == [
        ("train_loss", 0.5, 1),
        ("train_loss", 0.25, 2),
    ]
    assert run["status"] == "FINISHED"
    assert FakeMlflowClient.experiments == [f"{_RUN.project_id}/p"]
