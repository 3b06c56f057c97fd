"""A process that waits with its imports done runs a job as a fresh one does, and is never relied on."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from luthier.core.events import FinishedEvent, StoppedEvent, TrainingEvent, parse_event
from tests.conftest import wait_until
from tests.stack import is_alive
from tests.training_runs import Build
from worker.training_process.child import start_child
from worker.training_process.fork_server import ForkedRun, ForkServer

SETTINGS = {"num_rows": 12, "hyperparameters": {"n_epochs": 1, "batch_size": 4}}
MANY = {"num_rows": 60, "hyperparameters": {"n_epochs": 50, "batch_size": 1}}


@pytest.fixture
def fork_server() -> Iterator[ForkServer]:
    made = ForkServer(idle_seconds=60)
    made.start()
    yield made
    made.stop()


def run(folder: Path, fork_server: ForkServer | None) -> tuple[int, FinishedEvent]:
    """Return the pid of the process that ran a directory, and its last event."""
    events: list[TrainingEvent] = []
    with start_child(folder, 1, fork_server) as child:
        while child.exit_code() is None:
            events += child.poll_events(0.2)
        assert child.exit_code() == 0, (folder / "child.log").read_text()
    assert isinstance(events[-1], FinishedEvent)
    return child.pid, events[-1]


def test_a_spare_has_a_process_for_each_run_and_they_give_the_digest_of_a_fresh_one(
    build: Build, fork_server: ForkServer
) -> None:
    waiting = fork_server.pid
    first, warm = run(build("warm", **SETTINGS), fork_server)
    fork_server.start()
    assert fork_server.pid == waiting
    second, again = run(build("again", **SETTINGS), fork_server)
    _, cold = run(build("cold", **SETTINGS), None)
    assert len({waiting, first, second}) == 3
    assert warm.digest == again.digest == cold.digest
    assert not is_alive(first)
    assert not is_alive(second)
    os.kill(waiting, signal.SIGTERM)
    assert fork_server._process.wait(10) == 0


def test_a_spare_outlives_a_run_that_is_killed(build: Build, fork_server: ForkServer) -> None:
    waiting = fork_server.pid
    with start_child(build("killed", **MANY), 1, fork_server) as child:
        while not child.poll_events(0.2):
            assert child.exit_code() is None
        assert child.pid != waiting
        child.kill_group()
        while child.exit_code() is None:
            child.poll_events(0.2)
        assert child.exit_code() == -signal.SIGKILL
    run(build("next", **SETTINGS), fork_server)
    assert fork_server.pid == waiting


def test_beside_a_driver_that_no_forked_process_may_call_a_spare_makes_its_run_itself(
    tmp_path: Path, fork_server: ForkServer
) -> None:
    code = (
        "import os, pathlib\n"
        "from luthier.training import fork_server\n"
        "from luthier.training.process_io import StopRequest\n"
        "fork_server.NVIDIA_DRIVER = pathlib.Path('/')\n"
        "run = lambda folder, events, stop: os.write(events, f'{folder} {os.getpid()}'.encode()) < 0\n"
        "raise SystemExit(fork_server.fork_runs(run, StopRequest(), 60.0))\n"
    )
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    answers, their_answers = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    read, write = os.pipe()
    with ours, answers, subprocess.Popen([sys.executable, "-c", code], stdin=theirs.fileno()) as process:
        socket.send_fds(ours, [os.fsencode(tmp_path)], [write, their_answers.fileno()])
        for one in (theirs, their_answers):
            one.close()
        os.close(write)
        assert process.wait(30) == 1
        assert answers.recv(100).decode() == f"started {process.pid}"
        assert answers.recv(100) == b""
        with os.fdopen(read) as events:
            assert events.read() == f"{tmp_path} {process.pid}"


def test_a_run_of_two_threads_is_that_of_a_fresh_process_and_its_spare_has_one(
    build: Build, fork_server: ForkServer
) -> None:
    digests = []
    for name, own in (("forked", fork_server), ("fresh", None)):
        folder = build(name, **SETTINGS)
        spec = json.loads((folder / "spec.json").read_text())
        (folder / "spec.json").write_text(json.dumps(spec | {"num_threads": 2}))
        digests.append(run(folder, own)[1].digest)
    assert digests[0] == digests[1]
    # What has other threads loses them, and maybe their locks, in a fork.
    assert len(list(Path(f"/proc/{fork_server.pid}/task").iterdir())) == 1


def at_work(folder: Path, fork_server: ForkServer) -> ForkedRun:
    """Return a long run that has done a step."""
    taken = fork_server.take(folder)
    while b'"type":"step"' not in taken.stdout.readline():
        assert is_alive(taken.pid)
    return taken


def test_a_run_ends_with_its_spare(build: Build, fork_server: ForkServer) -> None:
    taken = at_work(build("run", **MANY), fork_server)
    forked = taken.pid
    assert fork_server.pid is not None
    assert forked != fork_server.pid
    os.kill(fork_server.pid, signal.SIGKILL)
    wait_until(lambda: not is_alive(forked), what="the run is gone")
    assert taken.wait() == -signal.SIGKILL
    taken.stdout.close()


def test_a_spare_that_is_asked_to_stop_lets_its_run_save_first(
    build: Build, tmp_path: Path, fork_server: ForkServer
) -> None:
    taken = at_work(build("run", **MANY), fork_server)
    fork_server._process.terminate()
    last = taken.stdout.readlines()[-1]
    assert isinstance(parse_event(last), StoppedEvent)
    assert taken.wait() == 0
    assert fork_server._process.wait(10) == 0
    assert list((tmp_path / "run" / "save_points").iterdir())
    taken.stdout.close()


@pytest.mark.parametrize(
    "seconds", [0.0, 1.0, *(pytest.param(n, marks=pytest.mark.full) for n in (0.3, 2.0))]
)
def test_a_run_that_is_asked_to_stop_while_its_spare_imports_does_not_begin(
    build: Build, seconds: float, fork_server: ForkServer
) -> None:
    with start_child(build("run", **SETTINGS), 1, fork_server) as child:
        time.sleep(seconds)
        child.ask_to_stop()
        events: list[TrainingEvent] = []
        while child.exit_code() is None:
            events += child.poll_events(0.2)
    assert not any(isinstance(event, FinishedEvent) for event in events)


def test_a_run_that_takes_longer_than_an_idle_process_may_wait_is_left_alone(build: Build) -> None:
    fork_server = ForkServer(idle_seconds=2)
    fork_server.start()
    taken = at_work(build("run", **MANY), fork_server)
    time.sleep(3)
    assert is_alive(taken.pid)
    fork_server.stop()
    taken.wait()
    taken.stdout.close()


def test_a_process_that_died_while_it_waited_is_replaced(build: Build, fork_server: ForkServer) -> None:
    waiting = fork_server.pid
    os.kill(waiting, signal.SIGKILL)
    fork_server._process.wait()
    pid, _ = run(build("run", **SETTINGS), fork_server)
    assert pid != waiting


def test_one_that_waits_too_long_is_ended() -> None:
    idle = ForkServer(idle_seconds=0.1)
    idle.start()
    pid = idle.pid
    assert pid is not None
    wait_until(lambda: not is_alive(pid), what="the idle process ends")
    assert idle.pid is None


def test_a_taken_process_that_ends_before_its_first_word_is_replaced_once(
    build: Build, fork_server: ForkServer
) -> None:
    waiting = fork_server.pid
    # It gets the directory, and never comes to read it.
    os.kill(waiting, signal.SIGSTOP)
    events: list[TrainingEvent] = []
    with start_child(build("run", **SETTINGS), 1, fork_server) as child:
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

    monkeypatch.setattr(ForkServer, "take", sleeper)
    monkeypatch.setattr("worker.training_process.child._spawn", sleeper)
    with start_child(tmp_path, 1, ForkServer(idle_seconds=60)) as child:
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
