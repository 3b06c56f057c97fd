"""The training child as a process: what it says, what it leaves, how it ends, how it goes on."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from luthier.core.events import (
    FailedEvent,
    FinishedEvent,
    StartedEvent,
    StoppedEvent,
    TrainingEvent,
    parse_event,
)
from luthier.data.prepared import read_prepared, write_prepared
from luthier.storage.manifests import verify_folder
from luthier.training.batches import make_plan
from tests.tiny import build_tiny_base, build_tiny_run

SETTINGS: dict[str, Any] = {
    "hyperparameters": {"n_epochs": 12, "batch_size": 4},
    "training": {"save_every_steps": 3, "learning_rate": 5e-3},
}
# The fast path, and the plain one with a generator of random numbers in every step.
TUNINGS: dict[str, dict[str, Any]] = {"fused": {}, "dropout": {"dropout": 0.2}}


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
        """Send a signal as soon as the event of a step is read."""
        for event in self:
            if event.type == "step" and event.step == step:
                self.process.send_signal(number)
                return
        pytest.fail(f"no step {step}: {self.errors()}")

    def errors(self) -> str:
        """Return what the child wrote to standard error."""
        assert self.process.stderr is not None
        return self.process.stderr.read()

    def end(self) -> list[TrainingEvent]:
        """Read the remaining events and wait for the exit."""
        events = list(self)
        self.process.wait(timeout=60)
        return events


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_base(tmp_path_factory.mktemp("bases") / "tiny-llama")


@pytest.fixture(scope="module")
def undisturbed(
    base: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, list[TrainingEvent]]]:
    """Both kinds of run without any trouble, by one child: its folder and its events by kind."""
    folder = tmp_path_factory.mktemp("undisturbed")
    runs = {name: build_tiny_run(folder / name, base, tuning=t, **SETTINGS) for name, t in TUNINGS.items()}
    child = Child(*map(str, runs.values()))
    events = child.end()
    assert child.process.returncode == 0, child.errors()
    ends = [i + 1 for i, event in enumerate(events) if event.type == "finished"]
    return {"fused": (runs["fused"], events[: ends[0]]), "dropout": (runs["dropout"], events[ends[0] :])}


def finished(events: list[TrainingEvent]) -> FinishedEvent:
    assert isinstance(events[-1], FinishedEvent), events[-1]
    return events[-1]


def started(events: list[TrainingEvent]) -> StartedEvent:
    return next(event for event in events if isinstance(event, StartedEvent))


def test_a_run_tells_its_story_in_order_and_the_loss_falls(
    undisturbed: dict[str, tuple[Path, list[TrainingEvent]]],
) -> None:
    folder, events = undisturbed["fused"]
    assert [event.type for event in events if event.type in {"started", "finished"}] == [
        "started",
        "finished",
    ]
    steps = [event for event in events if event.type == "step"]
    assert [event.step for event in steps] == list(range(1, 73))
    assert {event.total_steps for event in steps} == {72}
    losses = [event.metrics.train_loss for event in steps]
    assert sum(losses[-6:]) < 0.7 * sum(losses[:6])
    base_scored = next(event for event in events if event.type == "evaluated").evaluation
    metrics = finished(events).metrics
    assert metrics.full_valid_loss is not None
    assert metrics.full_valid_loss < base_scored.valid_loss
    rows = read_prepared(folder / "train.safetensors")
    assert finished(events).trained_tokens == 12 * rows.num_tokens == sum(event.num_tokens for event in steps)


def test_every_epoch_ends_in_a_checkpoint_and_the_last_one_is_the_artifact(
    undisturbed: dict[str, tuple[Path, list[TrainingEvent]]],
) -> None:
    folder, events = undisturbed["fused"]
    checkpoints = [event for event in events if event.type == "checkpoint"]
    assert [event.step for event in checkpoints] == list(range(6, 73, 6))
    assert all(event.metrics.full_valid_loss is not None for event in checkpoints)
    # An epoch's last step is told with the scores of its checkpoint, no other step is.
    steps = {event.step: event.metrics for event in events if event.type == "step"}
    scored = {step: metrics for step, metrics in steps.items() if metrics.full_valid_loss is not None}
    assert scored == {event.step: event.metrics for event in checkpoints}
    # Whoever reads the events takes them away.
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == [
        f"step-{step:06d}" for step in range(6, 73, 6)
    ]
    assert sorted(p.name for p in (folder / "save_points").iterdir()) == ["step-000069", "step-000072"]
    manifest = verify_folder(folder / "artifact")
    assert manifest.digest == checkpoints[-1].digest == finished(events).digest
    assert manifest.digest == verify_folder(folder / "checkpoints" / "step-000072").digest
    assert manifest.digested == ["adapter_config.json", "adapter_model.safetensors"]
    assert {"README.md", "training_log.jsonl"} <= set(manifest.files)
    log = [json.loads(line) for line in (folder / "artifact" / "training_log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if "train_loss" in line] == list(range(1, 73))


@pytest.mark.parametrize("kind", list(TUNINGS))
def test_kill_9_and_resume_give_the_undisturbed_digest(
    kind: str, base: Path, tmp_path: Path, undisturbed: dict[str, tuple[Path, list[TrainingEvent]]]
) -> None:
    folder = build_tiny_run(tmp_path / "run", base, tuning=TUNINGS[kind], **SETTINGS)
    child = Child(str(folder))
    child.signal_at_step(8, signal.SIGKILL)
    child.end()
    assert child.process.returncode == -signal.SIGKILL
    again = Child(str(folder))
    events = again.end()
    assert again.process.returncode == 0, again.errors()
    assert started(events).start_step >= 6
    assert started(events).start_step % 3 == 0
    _, expected = undisturbed[kind]
    assert finished(events).digest == finished(expected).digest
    assert not any(event.type == "evaluated" and event.evaluation.step == 0 for event in events)
    # The log has every step once, though some were done twice.
    log = (folder / "artifact" / "training_log.jsonl").read_bytes()
    assert log == (undisturbed[kind][0] / "artifact" / "training_log.jsonl").read_bytes()


@pytest.mark.parametrize("kind", list(TUNINGS))
def test_term_saves_the_last_step_and_the_next_attempt_repeats_none(
    kind: str, base: Path, tmp_path: Path, undisturbed: dict[str, tuple[Path, list[TrainingEvent]]]
) -> None:
    folder = build_tiny_run(tmp_path / "run", base, tuning=TUNINGS[kind], **SETTINGS)
    child = Child(str(folder))
    child.signal_at_step(7, signal.SIGTERM)
    events = child.end()
    assert child.process.returncode == 0
    stopped = events[-1]
    assert isinstance(stopped, StoppedEvent)
    verify_folder(folder / "save_points" / f"step-{stopped.step:06d}")
    assert not (folder / "artifact").exists()
    events = Child(str(folder)).end()
    assert started(events).start_step == stopped.step
    assert finished(events).digest == finished(undisturbed[kind][1]).digest


def test_another_run_directory_goes_on_with_the_history_of_the_first(
    base: Path, tmp_path: Path, undisturbed: dict[str, tuple[Path, list[TrainingEvent]]]
) -> None:
    expected, told = undisturbed["fused"]
    folder = build_tiny_run(tmp_path / "run", base, **SETTINGS)
    last = "save_points/step-000072"
    shutil.copytree(expected / last, folder / last)
    events = Child(str(folder)).end()
    assert not any(event.type == "step" for event in events)
    assert finished(events).metrics == finished(told).metrics
    assert finished(events).digest == finished(told).digest
    log = (folder / "artifact" / "training_log.jsonl").read_bytes()
    assert log == (expected / "artifact" / "training_log.jsonl").read_bytes()


def test_a_damaged_save_point_is_skipped_for_the_one_before_and_said_so(
    base: Path, tmp_path: Path, undisturbed: dict[str, tuple[Path, list[TrainingEvent]]]
) -> None:
    folder = build_tiny_run(tmp_path / "run", base, **SETTINGS)
    child = Child(str(folder))
    child.signal_at_step(8, signal.SIGTERM)
    child.end()
    older, newest = sorted((folder / "save_points").iterdir())
    path = newest / "weights.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    events = Child(str(folder)).end()
    warnings = [event.message for event in events if event.type == "message" and event.level == "warn"]
    assert len(warnings) == 1
    assert newest.name in warnings[0]
    assert started(events).start_step == int(older.name.removeprefix("step-"))
    assert finished(events).digest == finished(undisturbed["fused"][1]).digest


def test_a_save_point_of_other_settings_is_not_resumed(base: Path, tmp_path: Path) -> None:
    folder = build_tiny_run(
        tmp_path / "run", base, hyperparameters={"n_epochs": 2}, training={"save_every_steps": 1}
    )
    assert Child(str(folder)).end()[-1].type == "finished"
    other = build_tiny_run(tmp_path / "other", base, hyperparameters={"n_epochs": 3})
    (folder / "save_points").rename(other / "save_points")
    events = Child(str(other)).end()
    assert started(events).start_step == 0
    assert finished(events)


def test_a_loss_that_is_no_number_stops_the_run_names_step_and_lines_and_publishes_nothing(
    base: Path, tmp_path: Path
) -> None:
    broken = build_tiny_base(tmp_path / "bases" / "tiny-llama")
    weights = load_file(broken / "model.safetensors")
    # Token 299 never occurs but its logit is part of every prediction.
    weights["model.embed_tokens.weight"][299] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    folder = build_tiny_run(tmp_path / "run", broken, num_validation_rows=0, **SETTINGS)
    child = Child(str(folder))
    events = child.end()
    assert child.process.returncode == 1
    failed = events[-1]
    assert isinstance(failed, FailedEvent)
    assert (failed.code, failed.is_retryable) == ("non_finite_loss", False)
    rows = read_prepared(folder / "train.safetensors")
    spec = json.loads((folder / "spec.json").read_text())
    plan = make_plan(rows.lengths, batch_size=4, num_epochs=12, seed=spec["seed"])
    lines = ", ".join(str(line) for line in sorted(rows.lines[plan.steps[0]]))
    assert f"step 1 is not finite; it trained on lines {lines} of" in failed.message
    assert not (folder / "artifact").exists()
    assert not (folder / "checkpoints").exists()


def test_rows_without_a_supervised_token_fail_at_once(base: Path, tmp_path: Path) -> None:
    folder = build_tiny_run(tmp_path / "run", base)
    rows = read_prepared(folder / "train.safetensors")
    rows.supervised[:] = False
    write_prepared(rows, folder / "train.safetensors")
    child = Child(str(folder))
    events = child.end()
    assert child.process.returncode == 1
    assert [event.type for event in events] == ["failed"]
    assert isinstance(events[0], FailedEvent)
    assert (events[0].code, events[0].param) == ("invalid_training_file", "training_file")


def test_a_base_that_is_not_there_fails_with_its_code(base: Path, tmp_path: Path) -> None:
    folder = build_tiny_run(tmp_path / "run", base)
    inputs = json.loads((folder / "inputs.json").read_text())
    inputs["base_path"] = str(tmp_path / "nowhere")
    (folder / "inputs.json").write_text(json.dumps(inputs))
    child = Child(str(folder))
    events = child.end()
    assert child.process.returncode == 1
    assert isinstance(events[-1], FailedEvent)
    assert events[-1].code == "base_unavailable"


def test_a_warm_child_waits_for_a_directory_and_leaves_on_term(base: Path, tmp_path: Path) -> None:
    folder = build_tiny_run(tmp_path / "run", base, hyperparameters={"n_epochs": 1})
    child = Child("--warm", stdin=subprocess.PIPE)
    assert child.process.stdin is not None
    child.process.stdin.write(f"{folder}\n")
    child.process.stdin.flush()
    events: list[TrainingEvent] = []
    for event in child:
        events.append(event)
        if event.type == "finished":
            break
    assert finished(events)
    assert child.process.poll() is None
    child.process.send_signal(signal.SIGTERM)
    child.end()
    assert child.process.returncode == 0
