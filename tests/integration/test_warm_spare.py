"""A process that waits with its imports done runs a job as a fresh one does, and is never relied on."""

import os
import signal
import socket
import subprocess
import sys
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


def run(folder: Path, spare: WarmSpare | None) -> tuple[int, FinishedEvent]:
    """Return the pid of the process that ran a directory, and its last event."""
    events: list[TrainingEvent] = []
    with start_child(folder, 1, spare) as child:
        while child.exit_code() is None:
            events += child.poll_events(0.2)
        assert child.exit_code() == 0, (folder / "child.log").read_text()
    assert isinstance(events[-1], FinishedEvent)
    return child.pid, events[-1]


def test_a_spare_has_a_process_for_each_run_and_they_give_the_digest_of_a_fresh_one(
    base: Path, tmp_path: Path
) -> None:
    spare = WarmSpare(idle_seconds=60)
    spare.start(1)
    waiting = waiting_pid(spare)
    first, warm = run(build_tiny_run(tmp_path / "warm", base, **SETTINGS), spare)
    spare.start(1)
    assert waiting_pid(spare) == waiting
    second, again = run(build_tiny_run(tmp_path / "again", base, **SETTINGS), spare)
    _, cold = run(build_tiny_run(tmp_path / "cold", base, **SETTINGS), None)
    assert len({waiting, first, second}) == 3
    assert warm.digest == again.digest == cold.digest
    assert is_gone(first)
    assert is_gone(second)
    assert spare._process is not None
    assert waiting is not None
    os.kill(waiting, signal.SIGTERM)
    assert spare._process.wait(10) == 0
    spare.stop()


def test_a_spare_outlives_a_run_that_is_killed(base: Path, tmp_path: Path) -> None:
    spare = WarmSpare(idle_seconds=60)
    spare.start(1)
    waiting = waiting_pid(spare)
    many = SETTINGS | {"hyperparameters": {"n_epochs": 50, "batch_size": 1}}
    with start_child(build_tiny_run(tmp_path / "killed", base, **many), 1, spare) as child:
        while not child.poll_events(0.2):
            assert child.exit_code() is None
        assert child.pid != waiting
        child.kill_group()
        while child.exit_code() is None:
            child.poll_events(0.2)
        assert child.exit_code() == -signal.SIGKILL
    run(build_tiny_run(tmp_path / "next", base, **SETTINGS), spare)
    assert waiting_pid(spare) == waiting
    spare.stop()


def test_beside_a_driver_that_no_forked_process_may_call_a_spare_makes_its_run_itself(tmp_path: Path) -> None:
    code = (
        "import os, pathlib\n"
        "from luthier.training import forks\n"
        "from luthier.training.signals import StopRequest\n"
        "forks.NVIDIA_DRIVER = pathlib.Path('/')\n"
        "run = lambda folder, events, stop: os.write(events, f'{folder} {os.getpid()}'.encode()) < 0\n"
        "raise SystemExit(forks.fork_runs(run, StopRequest()))\n"
    )
    ours, theirs = socket.socketpair()
    with ours, theirs, subprocess.Popen([sys.executable, "-c", code], stdin=theirs.fileno()) as process:
        theirs.close()
        read, write = os.pipe()
        socket.send_fds(ours, [os.fsencode(tmp_path)], [write])
        os.close(write)
        assert process.wait(30) == 1
        assert ours.recv(100).decode() == f"started {process.pid}\n"
        with os.fdopen(read) as events:
            assert events.read() == f"{tmp_path} {process.pid}"


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
