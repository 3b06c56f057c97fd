"""Jobs of a worker whose processes wait with their imports done: in a row, paused, cancelled; and what such a
process hangs on and knows."""

import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import pytest

from db.tables import Job
from luthier.core.settings import Settings
from tests.conftest import Api, wait_until
from tests.rows import colour_rows, jsonl
from tests.stack import ROOT, is_alive
from tests.tiny import build_tiny_base, build_tiny_run
from worker.app import sweep
from worker.context import WorkerContext, make_context
from worker.processes import work
from worker.tasks.prepare import prepare
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
    return openai.OpenAI(base_url=f"{api.base_url}/v1", api_key=api.key, max_retries=0)


@pytest.fixture
def fork_server() -> Iterator[WatchedForkServer]:
    made = WatchedForkServer()
    yield made
    made.stop()


@pytest.fixture
def context(settings: Settings, api: Api, fork_server: WatchedForkServer) -> WorkerContext:
    made = make_context(settings)
    made.notify = api.notified.append
    made.fork_server = fork_server
    sweep(made)
    return made


@pytest.fixture
def create(client: openai.OpenAI) -> Callable[..., str]:
    def make(num_epochs: int = 1, batch_size: int = 4) -> str:
        file = client.files.create(file=("rows.jsonl", jsonl(colour_rows(12))), purpose="fine-tune")
        body = {
            "training": {"precision": "float32"},
            "hyperparameters": {"n_epochs": num_epochs, "batch_size": batch_size},
        }
        return client.fine_tuning.jobs.create(
            model="tiny-llama", training_file=file.id, seed=1, extra_body=body
        ).id

    return make


def test_jobs_in_a_row_are_run_by_one_fork_server_and_idle_notifications_start_none(
    client: openai.OpenAI, context: WorkerContext, fork_server: WatchedForkServer, create: Callable[..., str]
) -> None:
    first, second = create(), create()
    prepare(context, second)
    waiting = fork_server.pid
    assert waiting is not None
    work(context)
    assert [client.fine_tuning.jobs.retrieve(job).status for job in (first, second)] == ["succeeded"] * 2
    pids = [None if run is None else run.pid for run in fork_server.taken]
    assert len(pids) == 2
    assert len({*pids, waiting, None}) == 4
    assert fork_server.pid == waiting
    fork_server.stop()
    work(context)
    assert fork_server.pid is None


def test_a_pause_and_a_cancel_reach_a_process_that_had_waited(
    client: openai.OpenAI, context: WorkerContext, fork_server: WatchedForkServer, create: Callable[..., str]
) -> None:
    paused, cancelled = create(50, 1), create(50, 1)
    for job_id in (paused, cancelled):
        prepare(context, job_id)

    def step_of(job_id: str) -> int:
        with context.database.transaction() as session:
            return session.get_one(Job, job_id).step

    def act() -> None:
        wait_until(lambda: step_of(paused) > 0, what="the first job trains")
        client.fine_tuning.jobs.pause(paused)
        wait_until(lambda: step_of(cancelled) > 0, what="the second job trains")
        client.fine_tuning.jobs.cancel(cancelled)

    # A waiting process hangs on the thread that made it, so that one works.
    acting = threading.Thread(target=act)
    acting.start()
    work(context)
    acting.join(timeout=30)
    assert client.fine_tuning.jobs.retrieve(paused).status == "paused"
    assert client.fine_tuning.jobs.retrieve(cancelled).status == "cancelled"
    assert None not in fork_server.taken
    assert not any(is_alive(run.pid) for run in fork_server.taken if run is not None)
    with context.database.transaction() as session:
        job = session.get_one(Job, paused)
        assert job.num_crashes == 0
        assert [point["step"] for point in job.save_points][-1:] == [job.step]


def test_a_worker_that_stops_keeps_no_process_waiting(
    context: WorkerContext, fork_server: WatchedForkServer
) -> None:
    context.start_fork_server()
    pid = fork_server.pid
    assert pid is not None
    context.stopping.set()
    work(context)
    context.start_fork_server()
    assert fork_server.pid is None
    assert not is_alive(pid)


def test_a_waiting_process_dies_with_its_parent() -> None:
    parent = subprocess.Popen([sys.executable, "-c", _PARENT], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    wait_until(lambda: is_tied(pid), what="it is tied to its parent")
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    wait_until(lambda: not is_alive(pid), what="the waiting process is gone")


def test_a_run_dies_with_its_worker(tmp_path: Path) -> None:
    base = build_tiny_base(tmp_path / "tiny-llama")
    many = {"num_rows": 60, "hyperparameters": {"n_epochs": 50, "batch_size": 1}}
    folder = build_tiny_run(tmp_path / "run", base, **many)
    code = _PARENT.replace(
        "time.sleep(60)", f"run = fork_server.take(pathlib.Path({str(folder)!r}))\n{_REPORT}"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    waiting, forked = (int(parent.stdout.readline()) for _ in range(2))
    assert is_alive(forked)
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
