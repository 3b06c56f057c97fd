"""Attempts that were killed, stopped or damaged: the next one ends where an undisturbed run would have."""

import functools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from luthier.core.events import StartedEvent, StoppedEvent, TrainingEvent
from luthier.methods import discover
from luthier.storage.manifests import verify_folder
from luthier.training import build as assemble_module
from luthier.training.loop.gradient_accumulation import GradientAccumulator
from luthier.training.loop.loop import Loop
from luthier.training.output.resume_state import SavePoints
from tests.tiny import build_tiny_run
from tests.training_runs import Build, finished, run_here, run_killed_everywhere

METHODS = list(discover())
# Two epochs of three steps, a save point in the middle of each and at the end of the second.
SETTINGS: dict[str, Any] = {
    "num_rows": 12,
    "num_validation_rows": 3,
    "hyperparameters": {"n_epochs": 2, "batch_size": 4},
    "training": {"save_every_steps": 2, "learning_rate": 5e-3},
}
# Four rows of 12 to 47 tokens: every step has several micro-batches.
MAX_TOKENS = 64


def started(events: list[TrainingEvent]) -> StartedEvent:
    return next(event for event in events if isinstance(event, StartedEvent))


def tuning_of(method: str) -> dict[str, Any]:
    """Return a method's defaults, with random numbers in every step where it can have them."""
    has_dropout = "dropout" in discover()[method].Params.model_fields
    return {"type": method} | ({"dropout": 0.2} if has_dropout else {})


def log_of(folder: Path) -> bytes:
    return (folder / "artifact" / "training_log.jsonl").read_bytes()


@pytest.mark.parametrize(
    "method",
    # Low-rank updates and whole weights are kept in two ways; the other methods' are kept as the first are.
    [name if name in {"lora", "full"} else pytest.param(name, marks=pytest.mark.full) for name in METHODS],
)
def test_a_run_killed_after_every_event_gives_the_undisturbed_digest(method: str, build: Build) -> None:
    settings = SETTINGS | {"tuning": tuning_of(method)}
    undisturbed = build("undisturbed", **settings)
    expected = finished(run_here(undisturbed, max_tokens=MAX_TOKENS))
    folder = build("killed", **settings)
    num_kills, events = run_killed_everywhere(folder, max_tokens=MAX_TOKENS)
    # started, 6 steps, 3 save points, 2 checkpoints, 3 evaluations: before, at and after epoch ends.
    assert num_kills == 15
    found = finished(events)
    assert found.digest == expected.digest == verify_folder(folder / "artifact").digest
    # The log has every step once, though some were done many times.
    assert log_of(folder) == log_of(undisturbed)
    assert found.metrics == expected.metrics
    assert found.report.evaluations == expected.report.evaluations
    assert (found.report.tokens_seen, found.trained_tokens) == (
        expected.report.tokens_seen,
        expected.trained_tokens,
    )


@pytest.mark.parametrize("method", METHODS)
def test_term_saves_the_last_step_and_the_next_attempt_repeats_none(method: str, build: Build) -> None:
    # Without dropout, so that the fast path runs where there is one.
    settings = SETTINGS | {"tuning": {"type": method}}
    expected = finished(run_here(build("undisturbed", **settings)))
    folder = build("run", **settings)
    events = run_here(folder, term_after=lambda event: event.type == "step" and event.step == 5)
    assert isinstance(events[-1], StoppedEvent)
    assert events[-1].step == 5
    assert not (folder / "artifact").exists()
    # The worker's next attempt starts in a folder that has the save point and nothing else.
    again = build("again", **settings)
    shutil.copytree(folder / "save_points" / "step-000005", again / "save_points" / "step-000005")
    events = run_here(again)
    assert started(events).start_step == 5
    assert [event.step for event in events if event.type == "step"] == [6]
    assert finished(events).digest == expected.digest
    assert finished(events).report.evaluations == expected.report.evaluations


@pytest.mark.parametrize("method", METHODS)
def test_a_stop_before_the_first_step_leaves_nothing_to_resume_from(method: str, build: Build) -> None:
    folder = build("run", **SETTINGS, tuning={"type": method})
    events = run_here(folder, is_stopped=True)
    assert isinstance(events[-1], StoppedEvent)
    assert events[-1].step == 0
    assert not any(event.type in {"evaluated", "step", "save_point"} for event in events)
    assert list((folder / "save_points").iterdir()) == []


def test_another_run_directory_continues_with_the_history_of_the_first(build: Build) -> None:
    first = build("first", **SETTINGS)
    expected = finished(run_here(first))
    folder = build("run", **SETTINGS)
    shutil.copytree(first / "save_points" / "step-000006", folder / "save_points" / "step-000006")
    events = run_here(folder)
    assert not any(event.type == "step" for event in events)
    assert finished(events).metrics == expected.metrics
    assert finished(events).digest == expected.digest
    assert log_of(folder) == log_of(first)


# Runs copies of a directory, each in a process that is killed where it touches a file of its second save for
# the n-th time, until there is no n-th time. It forks before it computes: autograd can't be forked after.
_KILLED_IN_SAVES = """
import itertools, os, shutil, signal, sys
from pathlib import Path
from tests.training_runs import Build, run_here

def kill_at(number):
    touched = 0
    def touch(_, arguments):
        nonlocal touched
        # The save at step 2.
        if arguments and "step-000002" in str(arguments[0]):
            touched += 1
            if touched == number:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(touch)

for number in itertools.count(1):
    folder = Path(f"{sys.argv[1]}-{number}")
    shutil.copytree(sys.argv[1], folder)
    if (pid := os.fork()) == 0:
        kill_at(number)
        run_here(folder, kill_after=lambda event: event.type == "step" and event.step == 3)
        os._exit(0)
    exit_code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if exit_code == 0:
        break
    assert exit_code == -signal.SIGKILL
"""


@pytest.mark.full
def test_a_run_killed_anywhere_in_a_save_gives_the_undisturbed_digest(tmp_path: Path, build: Build) -> None:
    settings = SETTINGS | {"training": SETTINGS["training"] | {"save_every_steps": 1}}
    folder = build("run", **settings)
    subprocess.run([sys.executable, "-c", _KILLED_IN_SAVES, str(folder)], check=True, timeout=300)
    expected = finished(run_here(folder)).digest
    found = set()
    for killed in sorted(tmp_path.glob("run-*")):
        left = frozenset(path.relative_to(killed) for path in (killed / "save_points").rglob("*"))
        if left not in found:
            found.add(left)
            events = run_here(killed)
            # From the last save that was whole, or the one that had just become so.
            assert started(events).start_step in {1, 2, 3}
            assert finished(events).digest == expected
    assert len(found) > 5


@pytest.mark.parametrize(
    "name", ["weights.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]
)
def test_a_damaged_save_point_is_skipped_for_the_one_before_and_said_so(name: str, build: Build) -> None:
    folder = build("run", **SETTINGS)
    expected = finished(run_here(folder))
    shutil.rmtree(folder / "checkpoints")
    shutil.rmtree(folder / "artifact")
    path = folder / "save_points" / "step-000006" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    events = run_here(folder)
    warnings = [event.message for event in events if event.type == "message" and event.level == "warn"]
    assert len(warnings) == 1
    assert "step-000006" in warnings[0]
    assert started(events).start_step == 4
    assert finished(events).digest == expected.digest


def test_a_save_point_of_other_settings_or_other_validation_rows_is_not_resumed(build: Build) -> None:
    first = build("first", **SETTINGS)
    run_here(first)
    other_epochs = SETTINGS | {"hyperparameters": {"n_epochs": 3, "batch_size": 4}}
    other_rows = SETTINGS | {"num_validation_rows": 4}
    for name, settings in (("epochs", other_epochs), ("rows", other_rows)):
        other = build(name, **settings)
        shutil.copytree(first / "save_points", other / "save_points")
        events = run_here(other)
        assert started(events).start_step == 0
        assert finished(events)


def test_the_next_timed_save_waits_for_twenty_times_what_the_last_one_took(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = build_tiny_run(
        tmp_path / "run",
        base,
        num_rows=40,
        num_validation_rows=0,
        hyperparameters={"n_epochs": 1, "batch_size": 1},
        training={"learning_rate": 1e-3},
    )
    clock = SlowSaves(seconds_a_step=10.0, seconds_a_save=4.0)
    clock.install(monkeypatch)
    steps = [event.step for event in run_here(folder) if event.type == "save_point"]
    # The first after 30 s; then 80 s between the end of one and the beginning of the next.
    assert steps == [3, 11, 19, 27, 35]


class SlowSaves:
    """A clock that only steps and saves move on."""

    def __init__(self, *, seconds_a_step: float, seconds_a_save: float) -> None:
        self.now = 0.0
        self._seconds_a_step = seconds_a_step
        self._seconds_a_save = seconds_a_save

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        compute, write = GradientAccumulator.compute, SavePoints.write

        def step(*arguments: Any) -> Any:
            self.now += self._seconds_a_step
            return compute(*arguments)

        def save(*arguments: Any) -> Any:
            self.now += self._seconds_a_save
            return write(*arguments)

        monkeypatch.setattr(GradientAccumulator, "compute", step)
        monkeypatch.setattr(SavePoints, "write", save)
        monkeypatch.setattr(assemble_module, "Loop", functools.partial(Loop, clock=lambda: self.now))


def test_the_log_of_a_run_holds_the_bases_scores_and_every_step(build: Build) -> None:
    folder = build("run", **SETTINGS)
    run_here(folder)
    lines = [json.loads(line) for line in log_of(folder).splitlines()]
    assert {"base_valid_loss", "base_valid_mean_token_accuracy", "base_general_loss"} < set(lines[0])
    assert [line["step"] for line in lines] == list(range(7))


def test_a_step_has_one_save_point_though_a_stop_is_asked_right_after_it(build: Build) -> None:
    folder = build("run", training={"save_every_steps": 1})
    events = run_here(folder, term_after=lambda event: event.type == "save_point" and event.step == 2)
    saved = [event.step for event in events if event.type == "save_point"]
    assert saved == [1, 2]
    assert events[-1].type == "stopped"
