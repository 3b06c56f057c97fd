"""A process that waits with its imports done runs a job as a fresh one does, and is never relied on."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from luthier.core.events import FinishedEvent, TrainingEvent
from tests.conftest import wait_until
from tests.tiny import build_tiny_base, build_tiny_run
from worker.child import start_child
from worker.spare import WarmSpare

SETTINGS = {"num_rows": 12, "hyperparameters": {"n_epochs": 1, "batch_size": 4}}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_base(tmp_path_factory.mktemp("bases") / "tiny-llama")


def waiting_pid(spare: WarmSpare) -> int | None:
    return None if spare._process is None else spare._process.pid


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def run(folder: Path, spare: WarmSpare) -> tuple[int, FinishedEvent]:
    """Return the pid of the process that ran a directory, and its last event."""
    events: list[TrainingEvent] = []
    with start_child(folder, 1, spare) as child:
        while child.exit_code() is None:
            events += child.poll_events(0.2)
        assert child.exit_code() == 0, (folder / "child.log").read_text()
    assert isinstance(events[-1], FinishedEvent)
    return child.pid, events[-1]


def test_a_waiting_process_runs_the_next_job_once_and_gives_the_same_digest(
    base: Path, tmp_path: Path
) -> None:
    spare = WarmSpare(idle_seconds=60)
    spare.start(1)
    waiting = waiting_pid(spare)
    spare.start(1)
    assert waiting_pid(spare) == waiting
    first, warm = run(build_tiny_run(tmp_path / "warm", base, **SETTINGS), spare)
    second, cold = run(build_tiny_run(tmp_path / "cold", base, **SETTINGS), spare)
    assert first == waiting
    assert second != first
    assert warm.digest == cold.digest
    assert is_gone(first)


def test_a_process_that_died_while_it_waited_is_replaced(base: Path, tmp_path: Path) -> None:
    spare = WarmSpare(idle_seconds=60)
    spare.start(1)
    waiting = waiting_pid(spare)
    assert waiting is not None
    os.kill(waiting, signal.SIGKILL)
    assert spare._process is not None
    spare._process.wait()
    pid, _ = run(build_tiny_run(tmp_path / "run", base, **SETTINGS), spare)
    assert pid != waiting


def test_one_that_has_other_threads_or_waits_too_long_is_ended(tmp_path: Path) -> None:
    spare = WarmSpare(idle_seconds=60)
    spare.start(2)
    other = waiting_pid(spare)
    assert other is not None
    assert spare.take(tmp_path, num_threads=1) is None
    assert is_gone(other)
    idle = WarmSpare(idle_seconds=0.1)
    idle.start(1)
    pid = waiting_pid(idle)
    assert pid is not None
    wait_until(lambda: is_gone(pid), what="the idle process ends")
    assert waiting_pid(idle) is None


def test_a_taken_process_that_ends_before_its_first_word_is_replaced_once(base: Path, tmp_path: Path) -> None:
    spare = WarmSpare(idle_seconds=60)
    spare.start(1)
    waiting = waiting_pid(spare)
    assert waiting is not None
    # It gets the directory, and never comes to read it.
    os.kill(waiting, signal.SIGSTOP)
    events: list[TrainingEvent] = []
    with start_child(build_tiny_run(tmp_path / "run", base, **SETTINGS), 1, spare) as child:
        assert child.pid == waiting
        os.kill(waiting, signal.SIGKILL)
        while child.exit_code() is None:
            events += child.poll_events(0.2)
        assert child.pid != waiting
        assert child.exit_code() == 0
    assert isinstance(events[-1], FinishedEvent)


@pytest.mark.parametrize("why", ["asked to stop", "killed", "it has written", "the second too"])
def test_a_taken_process_is_not_replaced(why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sleeper(*_: object) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(["sleep", "60"], stdout=subprocess.PIPE, start_new_session=True)

    monkeypatch.setattr(WarmSpare, "take", sleeper)
    monkeypatch.setattr("worker.child._spawn", sleeper)
    with start_child(tmp_path, 1, WarmSpare(idle_seconds=60)) as child:
        first = child.pid
        if why == "asked to stop":
            child.ask_to_stop()
        elif why == "killed":
            child.kill_group()
        else:
            if why == "it has written":
                (tmp_path / "save_points").mkdir()
            os.killpg(first, signal.SIGTERM)
        child.poll_events(5)
        if why == "the second too":
            assert child.pid != first
            assert child.exit_code() is None
            os.killpg(child.pid, signal.SIGTERM)
            child.poll_events(5)
        else:
            assert child.pid == first
        assert child.exit_code() in (-signal.SIGTERM, -signal.SIGKILL)
