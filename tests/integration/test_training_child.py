"""The training child as a process: what it says, what it leaves, how it ends, how it continues."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from luthier.core.events import StartedEvent, StoppedEvent, TrainingEvent, parse_event
from luthier.data.prepare.prepared_rows import read_prepared, write_prepared
from luthier.storage.manifests import verify_folder
from luthier.training.loop.evaluation import general_passages
from tests.tiny import build_tiny_base, build_tiny_rows, build_tiny_run
from tests.training_runs import Build, failed, finished, run_here

# Four epochs of six steps; in every step random numbers are drawn.
SETTINGS: dict[str, Any] = {
    "tuning": {"dropout": 0.2},
    "hyperparameters": {"n_epochs": 4, "batch_size": 4},
    "training": {"save_every_steps": 3, "learning_rate": 5e-3},
}


class Child:
    """A running child whose events are read one by one."""

    def __init__(self, *arguments: str, stdin: int | None = None) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "luthier.training", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=stdin,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def __iter__(self) -> Iterator[TrainingEvent]:
        assert self.process.stdout is not None
        return (parse_event(line) for line in self.process.stdout)

    def signal_at_step(self, step: int, number: int) -> None:
        for event in self:
            if event.type == "step" and event.step == step:
                self.process.send_signal(number)
                return
        pytest.fail(f"no step {step}: {self.errors()}")

    def errors(self) -> str:
        return self.process.stderr.read()

    def end(self) -> list[TrainingEvent]:
        events = list(self)
        self.process.wait(timeout=60)
        return events


@pytest.fixture(scope="module")
def process(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[TrainingEvent], int]:
    """One process over two run directories, the first without a base: the second, all events, exit code."""
    folder = tmp_path_factory.mktemp("process")
    baseless = build_tiny_run(folder / "baseless", base)
    inputs = json.loads((baseless / "inputs.json").read_text())
    (baseless / "inputs.json").write_text(json.dumps(inputs | {"base_path": str(folder / "nowhere")}))
    run = build_tiny_run(folder / "run", base, **SETTINGS)
    child = Child(str(baseless), str(run))
    events = child.end()
    return run, events, child.process.returncode


Undisturbed = tuple[Path, list[TrainingEvent]]


@pytest.fixture(scope="module")
def undisturbed(process: tuple[Path, list[TrainingEvent], int]) -> Undisturbed:
    """A run without any trouble: its folder and its events."""
    folder, events, _ = process
    return folder, events[1:]


def test_a_base_that_is_not_there_fails_with_its_code_and_the_next_run_goes_its_way(
    process: tuple[Path, list[TrainingEvent], int],
) -> None:
    _, events, exit_code = process
    assert failed(events[:1]).code == "base_unavailable"
    assert finished(events)
    assert exit_code == 1


def started(events: list[TrainingEvent]) -> StartedEvent:
    return next(event for event in events if isinstance(event, StartedEvent))


def test_a_run_reports_its_events_in_order(undisturbed: Undisturbed) -> None:
    folder, events = undisturbed
    an_epoch = ["step"] * 5 + ["step", "checkpoint", "evaluated"]
    kinds = [event.type for event in events if event.type not in {"save_point", "message"}]
    assert kinds == ["started", "evaluated", *an_epoch * 4, "finished"]
    steps = [event for event in events if event.type == "step"]
    assert [event.step for event in steps] == list(range(1, 25))
    assert {event.total_steps for event in steps} == {24}
    rows = read_prepared(folder / "train.safetensors")
    assert finished(events).trained_tokens == 4 * rows.num_tokens == sum(event.num_tokens for event in steps)


def test_the_loss_falls_on_training_and_validation_rows(build: Build) -> None:
    settings = SETTINGS | {"tuning": {}, "hyperparameters": {"n_epochs": 12, "batch_size": 4}}
    events = run_here(build("run", **settings), num_passages=1)
    losses = [event.metrics.train_loss for event in events if event.type == "step"]
    assert sum(losses[-6:]) < 0.7 * sum(losses[:6])
    first, *_, last = finished(events).report.evaluations
    assert last.valid_loss < first.valid_loss
    assert finished(events).metrics.full_valid_loss == last.valid_loss


def test_every_epoch_ends_in_a_checkpoint_and_the_last_one_is_the_artifact(undisturbed: Undisturbed) -> None:
    folder, events = undisturbed
    checkpoints = [event for event in events if event.type == "checkpoint"]
    assert [event.step for event in checkpoints] == [6, 12, 18, 24]
    assert all(event.metrics.full_valid_loss is not None for event in checkpoints)
    # An epoch's last step is reported with the scores of its checkpoint, no other step is.
    steps = {event.step: event.metrics for event in events if event.type == "step"}
    scored = {step: metrics for step, metrics in steps.items() if metrics.full_valid_loss is not None}
    assert scored == {event.step: event.metrics for event in checkpoints}
    # The reader of the events removes them.
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == [
        f"step-{step:06d}" for step in (6, 12, 18, 24)
    ]
    assert sorted(p.name for p in (folder / "save_points").iterdir()) == ["step-000021", "step-000024"]
    manifest = verify_folder(folder / "artifact")
    assert manifest.digest == checkpoints[-1].digest == finished(events).digest
    assert manifest.digest == verify_folder(folder / "checkpoints" / "step-000024").digest
    assert manifest.digested == ["adapter_config.json", "adapter_model.safetensors"]
    assert {"README.md", "training_log.jsonl", "canary.json"} <= set(manifest.files)
    log = [json.loads(line) for line in (folder / "artifact" / "training_log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if "train_loss" in line] == list(range(1, 25))


def test_kill_9_and_resume_give_the_undisturbed_digest(undisturbed: Undisturbed, build: Build) -> None:
    folder = build("run", **SETTINGS)
    child = Child(str(folder))
    child.signal_at_step(8, signal.SIGKILL)
    child.end()
    assert child.process.returncode == -signal.SIGKILL
    again = Child(str(folder))
    events = again.end()
    assert again.process.returncode == 0, again.errors()
    assert started(events).start_step >= 6
    assert started(events).start_step % 3 == 0
    assert finished(events).digest == finished(undisturbed[1]).digest
    assert not any(event.type == "evaluated" and event.evaluation.step == 0 for event in events)
    # The log has every step once, though some were done twice.
    log = (folder / "artifact" / "training_log.jsonl").read_bytes()
    assert log == (undisturbed[0] / "artifact" / "training_log.jsonl").read_bytes()


def test_term_saves_the_last_step_and_the_next_attempt_resumes_from_it(
    undisturbed: Undisturbed, build: Build
) -> None:
    folder = build("run", **SETTINGS)
    child = Child(str(folder))
    child.signal_at_step(7, signal.SIGTERM)
    events = child.end()
    assert child.process.returncode == 0
    stopped = events[-1]
    assert isinstance(stopped, StoppedEvent)
    verify_folder(folder / "save_points" / f"step-{stopped.step:06d}")
    assert not (folder / "artifact").exists()
    # Whatever the process, the numbers are the same.
    events = run_here(folder, num_passages=len(general_passages()))
    assert started(events).start_step == stopped.step
    assert finished(events).digest == finished(undisturbed[1]).digest
    assert finished(events).report.evaluations == finished(undisturbed[1]).report.evaluations


def test_a_base_that_gives_no_numbers_fails_before_the_first_step(base: Path, tmp_path: Path) -> None:
    broken = build_tiny_base(tmp_path / "bases" / "tiny-llama")
    weights = load_file(broken / "model.safetensors")
    # Token 299 never occurs but its logit is part of every prediction.
    weights["model.embed_tokens.weight"][299] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    folder = build_tiny_run(tmp_path / "run", broken, num_validation_rows=0, **SETTINGS)
    events = run_here(folder)
    assert (failed(events).code, failed(events).is_retryable) == ("non_finite_loss", False)
    assert "The base's loss on the general text" in failed(events).message
    assert not any(event.type == "step" for event in events)
    assert not (folder / "artifact").exists()
    assert not (folder / "checkpoints").exists()


def test_rows_without_a_supervised_token_fail_at_once(build: Build) -> None:
    folder = build("run")
    rows = read_prepared(folder / "train.safetensors")
    rows.supervised[:] = False
    write_prepared(rows, folder / "train.safetensors")
    events = run_here(folder)
    assert [event.type for event in events] == ["failed"]
    assert (failed(events).code, failed(events).param) == ("invalid_training_file", "training_file")


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_virtual_tokens_that_leave_too_little_of_the_context_are_refused(method: str, build: Build) -> None:
    longest = int(build_tiny_rows(24).lengths.max())
    # The base's context is 256 tokens; the general text fits into whatever is left.
    fits = {"type": method, "num_virtual_tokens": 256 - longest}
    settings = {"hyperparameters": {"n_epochs": 1}, "num_validation_rows": 0}
    assert finished(run_here(build("fits", tuning=fits, **settings)))
    too_many = {"type": method, "num_virtual_tokens": 257 - longest}
    event = failed(run_here(build("run", tuning=too_many, **settings)))
    assert (event.code, event.param) == ("invalid_value", "tuning.num_virtual_tokens")
    assert f"training.max_length to {longest - 1}" in event.message


def test_a_sample_prompt_over_the_context_is_refused_by_its_number(build: Build) -> None:
    prompts = ["short", "long " * 300]
    events = run_here(build("run", training={"sample_prompts": prompts}))
    assert (failed(events).code, failed(events).param) == ("invalid_value", "training.sample_prompts.1")
    assert "Sample prompt 2" in failed(events).message
    assert "long" not in failed(events).message
