"""What makes no progress is ended by name and tried again: real processes that hang, a timer of a second."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import openai
import pytest

from luthier.storage.store import Storage
from tests.conftest import Api, wait_until
from tests.stack import is_alive
from tests.training import Jobs
from worker.context import WorkerContext
from worker.heartbeat import lease_heartbeat
from worker.tasks.prepare import prepare
from worker.tasks.train import make_run
from worker.training_process.child import TrainingChild
from worker.training_process.supervisor import Ending

# Says that it started, takes a step, and then hangs, or steps for ever; it never answers TERM. A file shows
# that the first step is in the pipe: on a busy machine a process may take longer than a second to start.
_PROGRAM = """
import json, pathlib, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
job_id, hangs = sys.argv[1], sys.argv[2] == "hangs"
def say(**event):
    print(json.dumps({"job_id": job_id, **event}), flush=True)
say(type="started", start_step=0, total_steps=1000, device="cpu", precision="float32", load_seconds=1.0,
    num_trained_parameters=1)
step = 0
while True:
    step += 1
    say(type="step", step=step, total_steps=1000, epoch=1.0, metrics={"train_loss": 1.0}, learning_rate=1e-3,
        grad_norm=1.0, num_tokens=1, num_supervised_tokens=1, tokens_per_second=1.0, seconds_left=1.0,
        peak_memory_bytes=1)
    pathlib.Path(sys.argv[3]).touch()
    time.sleep(3600 if hangs else 0.05)
"""


@pytest.fixture
def client(api: Api) -> openai.OpenAI:
    # Not the strict one: the SDK's types lack `pausing` and `paused`.
    return api.client(is_strict=False)


@pytest.fixture
def context(context: WorkerContext) -> WorkerContext:
    context.settings = context.settings.model_copy(update={"stall_seconds": 1.0, "max_attempts": 2})
    return context


@pytest.fixture
def job_id(jobs: Jobs, context: WorkerContext) -> str:
    """A prepared job; the check of its files may take longer than a second."""
    impatient = context.settings
    context.settings = impatient.model_copy(update={"stall_seconds": 60.0})
    made = jobs.prepared()
    context.settings = impatient
    return made


@pytest.fixture
def unchecked_id(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> str:
    """A job whose files' check hangs: its training file is a pipe that nothing is written to."""

    def make_pipe(_storage: Storage, _key: str, destination: Path, **_: object) -> None:
        os.mkfifo(destination)

    monkeypatch.setattr(Storage, "fetch_file", make_pipe)
    return jobs.create()


def _attempt(jobs: Jobs, folder: Path, *, how: str, is_paused: bool = False) -> Ending:
    """Follow one attempt over a process that never ends by itself."""
    claimed, has_stepped = jobs.claim(), folder / "has-stepped"
    has_stepped.unlink(missing_ok=True)
    command = [sys.executable, "-c", _PROGRAM, claimed.lease.job_id, how, str(has_stepped)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    child = TrainingChild(process)
    try:
        wait_until(has_stepped.exists, what="the first step")
        with lease_heartbeat(jobs.context, claimed.lease) as heartbeat:
            heartbeat.on_pause = child.ask_to_stop
            if is_paused:
                jobs.pause(claimed.lease.job_id)
            ending = make_run(jobs.context, claimed, folder, heartbeat).supervise(child)
    finally:
        child.kill()
    assert not is_alive(process.pid)
    return ending


def test_stalled_training_is_tried_again_and_fails_by_name(jobs: Jobs, job_id: str, tmp_path: Path) -> None:
    assert _attempt(jobs, tmp_path, how="hangs") is Ending.CRASHED
    events = jobs.client.fine_tuning.jobs.list_events(job_id)
    (reported,) = [event for event in events if (event.data or {}).get("code")]
    assert reported.data["code"] == "stalled"
    assert reported.message == (
        "Training made no progress for 1 s after step 1, and was ended (LUTHIER_STALL_SECONDS). "
        "The job continues from its beginning."
    )
    assert jobs.status(job_id) == "queued"
    assert _attempt(jobs, tmp_path, how="hangs") is Ending.FAILED
    assert jobs.error(job_id).code == "stalled"


@pytest.mark.parametrize("how", ["hangs", "steps"])
def test_a_pause_that_the_process_does_not_answer_ends_it_and_is_no_crash(
    jobs: Jobs, job_id: str, tmp_path: Path, how: str
) -> None:
    assert _attempt(jobs, tmp_path, how=how, is_paused=True) is Ending.PAUSED
    job = jobs.row(job_id)
    assert (job.status, job.num_crashes, job.lease_owner) == ("paused", 0, None)


def test_a_worker_that_stops_waits_for_a_save_as_long_as_is_set(
    jobs: Jobs, job_id: str, context: WorkerContext, tmp_path: Path
) -> None:
    context.settings = context.settings.model_copy(update={"stall_seconds": 600.0, "stop_seconds": 1.0})
    began = time.monotonic()
    stop = threading.Timer(1, context.stopping.set)
    stop.start()
    assert _attempt(jobs, tmp_path, how="hangs") is not Ending.FAILED
    assert time.monotonic() - began < 20
    assert (jobs.status(job_id), jobs.row(job_id).num_crashes) == ("queued", 0)


def test_a_check_of_files_that_stalls_is_ended_tried_again_and_fails_by_name(
    jobs: Jobs, context: WorkerContext, unchecked_id: str
) -> None:
    prepare(context, unchecked_id)
    assert (jobs.status(unchecked_id), jobs.row(unchecked_id).num_crashes) == ("validating_files", 1)
    prepare(context, unchecked_id)
    error = jobs.error(unchecked_id)
    assert error.code == "stalled"
    assert "made no progress for 1 s" in error.message
    assert not any(context.settings.runs_dir.rglob("*"))


@pytest.mark.parametrize(("how", "status"), [("cancel", "cancelled"), ("stop", "validating_files")])
def test_a_check_of_files_ends_at_once_when_its_job_is_cancelled_or_its_worker_stops(
    jobs: Jobs, context: WorkerContext, unchecked_id: str, how: str, status: str
) -> None:
    context.settings = context.settings.model_copy(update={"stall_seconds": 600.0, "control_seconds": 0.1})
    thread = threading.Thread(target=prepare, args=(context, unchecked_id))
    thread.start()
    wait_until(lambda: any(context.settings.runs_dir.rglob("question.json")))
    if how == "cancel":
        jobs.cancel(unchecked_id)
    else:
        context.stopping.set()
    thread.join(20)
    assert not thread.is_alive()
    job = jobs.row(unchecked_id)
    assert (job.status, job.num_crashes, job.error) == (status, 0, None)
    if how == "stop":
        assert job.lease_owner is None
    assert not any(context.settings.runs_dir.rglob("*"))
