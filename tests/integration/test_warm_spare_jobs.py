"""Jobs of a worker whose processes wait with their imports done: in a row, paused, cancelled; and what such a
process hangs on and knows."""

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.conftest import Api, wait_until
from tests.stack import ROOT, is_alive
from tests.tiny import build_tiny_run
from tests.training import Jobs
from worker.context import WorkerContext
from worker.processes import work
from worker.training_process.fork_server import ForkedRun, ForkServer

_PARENT = """
import pathlib, sys, time
from worker.training_process.fork_server import ForkedRun, ForkServer
fork_server = ForkServer(idle_seconds=60)
fork_server.start()
print(fork_server.pid, flush=True)
time.sleep(60)
"""


_REPORT = """
while b'"type":"step"' not in run.stdout.readline():
    pass
print(run.pid, flush=True)
time.sleep(60)
"""


class WatchedForkServer(ForkServer):
    """Remembers which runs were asked of a fork server."""

    def __init__(self) -> None:
        super().__init__(idle_seconds=60)
        self.taken: list[ForkedRun | None] = []

    def take(self, run_dir: Path) -> ForkedRun | None:
        run = super().take(run_dir)
        self.taken.append(run)
        return run


def is_tied(pid: int) -> bool:
    """Return whether a process has become a training process, which its parent's end then ends."""
    command = Path(f"/proc/{pid}/cmdline").read_bytes()
    return b"luthier.training" in command and b"luthier.core.runtime" not in command


@pytest.fixture
def client(api: Api) -> openai.OpenAI:
    return api.client(is_strict=False)


@pytest.fixture
def fork_server() -> Iterator[WatchedForkServer]:
    made = WatchedForkServer()
    yield made
    made.stop()


@pytest.fixture
def context(context: WorkerContext, fork_server: WatchedForkServer) -> WorkerContext:
    context.fork_server = fork_server
    return context


def test_jobs_in_a_row_are_run_by_one_fork_server_and_idle_notifications_start_none(
    jobs: Jobs, context: WorkerContext, fork_server: WatchedForkServer
) -> None:
    first, second = jobs.create(), jobs.prepared()
    waiting = fork_server.pid
    assert waiting is not None
    work(context)
    for job_id in (first, second):
        jobs.succeeded(job_id)
    pids = [run.pid for run in fork_server.taken]
    assert len({*pids, waiting}) == 1 + len(pids) == 3
    assert fork_server.pid == waiting
    fork_server.stop()
    work(context)
    assert fork_server.pid is None


def test_a_pause_and_a_cancel_reach_a_process_that_had_waited(
    jobs: Jobs, context: WorkerContext, fork_server: WatchedForkServer
) -> None:
    many = {"hyperparameters": {"n_epochs": 50, "batch_size": 1}}
    paused, cancelled = jobs.prepared(**many), jobs.prepared(**many)

    def act() -> None:
        wait_until(lambda: jobs.row(paused).step > 0, what="the first job trains")
        jobs.pause(paused)
        wait_until(lambda: jobs.row(cancelled).step > 0, what="the second job trains")
        jobs.cancel(cancelled)

    # A waiting process hangs on the thread that made it, so that one works.
    acting = threading.Thread(target=act)
    acting.start()
    work(context)
    acting.join(timeout=30)
    assert (jobs.status(paused), jobs.status(cancelled)) == ("paused", "cancelled")
    assert not any(is_alive(run.pid) for run in fork_server.taken)
    job = jobs.row(paused)
    assert job.num_crashes == 0
    assert [point["step"] for point in job.save_points][-1:] == [job.step]


def test_a_stopped_worker_keeps_no_process(context: WorkerContext, fork_server: WatchedForkServer) -> None:
    context.start_fork_server()
    pid = fork_server.pid
    assert pid is not None
    context.stopping.set()
    work(context)
    context.start_fork_server()
    assert fork_server.pid is None
    assert not is_alive(pid)


def test_a_run_dies_with_its_worker(base: Path, tmp_path: Path) -> None:
    many = {"num_rows": 60, "hyperparameters": {"n_epochs": 50, "batch_size": 1}}
    folder = build_tiny_run(tmp_path / "run", base, **many)
    code = _PARENT.replace(
        "time.sleep(60)", f"run = fork_server.take(pathlib.Path({str(folder)!r}))\n{_REPORT}"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    waiting, forked = (int(parent.stdout.readline()) for _ in range(2))
    assert is_alive(waiting) and is_alive(forked)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    wait_until(lambda: not is_alive(waiting) and not is_alive(forked), what="both are gone")


def test_a_waiting_process_knows_no_secret(
    fork_server: WatchedForkServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["DATABASE_URL", "REDIS_URL", "STORAGE_URL", "BOOTSTRAP_API_KEY", "INFERENCE_TOKEN"]
    for name in [
        *(f"LUTHIER_{name}" for name in names),
        "AWS_SECRET_ACCESS_KEY",
        "HF_TOKEN",
        "WANDB_API_KEY",
    ]:
        monkeypatch.setenv(name, "hush")
    fork_server.start()
    pid = fork_server.pid
    assert pid is not None
    folder = Path(f"/proc/{pid}")
    # Both what the process was started by and what it has become.
    assert b"hush" not in (folder / "environ").read_bytes()
    wait_until(lambda: is_tied(pid), what="it is a training process")
    environment = (folder / "environ").read_bytes()
    assert b"OMP_NUM_THREADS=1" in environment
    assert b"hush" not in environment
    assert b"LUTHIER_" not in environment
