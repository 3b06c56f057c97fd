"""Memory that runs out in a step: smaller parts, the same sums, or an error that names the figures."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from luthier.core.events import MessageEvent, TrainingEvent
from luthier.methods import discover
from luthier.modeling.training_protocols import Batch, Loss
from luthier.training.model.training_model import JobModel
from tests.training_runs import Build, failed, finished, run_here

SETTINGS: dict[str, Any] = {
    "num_rows": 24,
    "num_validation_rows": 0,
    "hyperparameters": {"n_epochs": 1, "batch_size": 8},
    "training": {"save_every_steps": 1, "learning_rate": 5e-3},
}
ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: 12 bytes"),
    MemoryError(),
]


def limit_tokens(monkeypatch: pytest.MonkeyPatch, limit: int, error: BaseException = ERRORS[0]) -> None:
    """Let every training part with more tokens, padding included, run out of memory in its backward pass."""
    add_gradients, loss = JobModel.add_gradients, JobModel.loss
    size = 0

    def measured(training_model: JobModel, batch: Batch) -> Loss:
        nonlocal size
        size = batch.token_ids_BT.numel()
        return loss(training_model, batch)

    def limited(training_model: JobModel, value: torch.Tensor) -> None:
        add_gradients(training_model, value)
        if size > limit:
            raise error

    monkeypatch.setattr(JobModel, "loss", measured)
    monkeypatch.setattr(JobModel, "add_gradients", limited)


def warnings_of(events: list[TrainingEvent]) -> list[str]:
    return [e.message for e in events if isinstance(e, MessageEvent) and e.level == "warn"]


@pytest.mark.parametrize("error", ERRORS, ids=["cuda", "cpu", "python"])
def test_a_step_that_does_not_fit_is_done_again_in_halves_with_the_same_result(
    error: BaseException, monkeypatch: pytest.MonkeyPatch, build: Build
) -> None:
    # Dropout draws random numbers in every part: the step that is done again must draw the same.
    settings = SETTINGS | {"tuning": {"dropout": 0.2}}
    limit_tokens(monkeypatch, 250, error)
    events = run_here(build("halved", **settings))
    (warning,) = warnings_of(events)
    match = re.search(r"step 1 with 8 rows \((\d+) tokens\).* at most (\d+) tokens.*1 of at most 3", warning)
    assert match is not None, warning
    size, half = map(int, match.groups())
    assert half == size // 2 <= 250
    report = finished(events).report
    assert report.micro_batch_halvings == 1
    monkeypatch.undo()
    small = finished(run_here(build("small", **settings), max_tokens=half))
    assert small.report.micro_batch_halvings == 0
    assert finished(events).digest == small.digest
    assert small.trained_tokens == finished(events).trained_tokens


def test_halves_are_kept_by_the_attempts_after(monkeypatch: pytest.MonkeyPatch, build: Build) -> None:
    limit_tokens(monkeypatch, 250)
    expected = finished(run_here(build("undisturbed", **SETTINGS)))
    folder = build("run", **SETTINGS)
    run_here(folder, kill_after=lambda event: event.type == "step" and event.step == 2)
    # The next attempt finds room enough, and still computes as the first one began.
    monkeypatch.undo()
    events = run_here(folder)
    assert not warnings_of(events)
    assert finished(events).digest == expected.digest
    assert finished(events).report.micro_batch_halvings == 1


@pytest.mark.parametrize("method", list(discover()))
def test_the_effective_batch_is_unchanged(method: str, monkeypatch: pytest.MonkeyPatch, build: Build) -> None:
    settings = SETTINGS | {"tuning": {"type": method}}
    whole = run_here(build("whole", **settings))
    limit_tokens(monkeypatch, 120)
    halved = run_here(build("halved", **settings))
    assert 1 < finished(halved).report.micro_batch_halvings <= 3
    expected = [event for event in whole if event.type == "step"]
    found = [event for event in halved if event.type == "step"]
    assert [e.num_supervised_tokens for e in found] == [e.num_supervised_tokens for e in expected]
    losses = [event.metrics.train_loss for event in expected]
    assert [event.metrics.train_loss for event in found] == pytest.approx(losses, rel=1e-4)
    assert [e.grad_norm for e in found] == pytest.approx([e.grad_norm for e in expected], rel=1e-3)


def test_a_row_that_does_not_fit_alone_ends_the_job_with_need_and_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, build: Build
) -> None:
    settings = SETTINGS | {"hyperparameters": {"n_epochs": 1, "batch_size": 1}}
    limit_tokens(monkeypatch, 11)
    events = run_here(build("run", **settings))
    event = failed(events)
    assert (event.code, event.is_retryable) == ("out_of_memory", False)
    assert re.search(r"Step 1, with one row of \d+ tokens at a time, does not fit into memory", event.message)
    assert re.search(r"about [\d,]+ MiB are needed .* cpu has [\d,]+ MiB", event.message)
    assert not warnings_of(events)
    assert not (tmp_path / "run" / "artifact").exists()


def test_the_fourth_time_ends_the_job(monkeypatch: pytest.MonkeyPatch, build: Build) -> None:
    settings = SETTINGS | {"num_rows": 48, "hyperparameters": {"n_epochs": 1, "batch_size": 48}}
    limit_tokens(monkeypatch, 50)
    events = run_here(build("run", **settings))
    assert len(warnings_of(events)) == 3
    assert failed(events).code == "out_of_memory"
    assert re.search(r"Step 1, with \d+ rows of \d+ tokens at a time", failed(events).message)
