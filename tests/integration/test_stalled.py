"""What makes no progress is ended by name and tried again: real processes that hang, a timer of a second."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import openai
import pytest

from db.tables import Job
from luthier.storage.store import Storage
from tests.conftest import Api, wait_until
from tests.integration.hooks import create_job
from tests.stack import is_alive
from tests.training import job_row
from worker.context import WorkerContext
from worker.heartbeat import lease_heartbeat
from worker.tasks.prepare import prepare
from worker.tasks.train import claim, make_run
from worker.training_process.child import TrainingChild
from worker.training_process.supervisor import Ending

# Says that it started, takes a step, and then hangs, or steps for ever; it never answers TERM.
_PROGRAM = """
import json, signal, sys, time
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
    time.sleep(3600 if hangs else 0.05)
"""


@pytest.fixture
def client(api: Api) -> openai.OpenAI:
    # Not the strict one: the SDK's types lack `pausing` and `paused`.
    return openai.OpenAI(base_url=f"{api.base_url}/v1", api_key=api.key, max_retries=0)


@pytest.fixture
def context(context: WorkerContext) -> WorkerContext:
    context.settings = context.settings.model_copy(update={"stall_seconds": 1.0, "max_attempts": 2})
    return context


@pytest.fixture
def pipe_for_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that checks files hangs: its training file is a pipe that nothing is written to."""

    def lay_pipe(_storage: Storage, _key: str, destination: Path, **_: object) -> None:
        os.mkfifo(destination)

    monkeypatch.setattr(Storage, "fetch_file", lay_pipe)


def _queue(client: openai.OpenAI, context: WorkerContext) -> str:
    job_id = create_job(client)
    impatient = context.settings
    # The check's own process may take longer than a second to start.
    context.settings = impatient.model_copy(update={"stall_seconds": 60.0})
    prepare(context, job_id)
    context.settings = impatient
    return job_id


def _attempt(
    client: openai.OpenAI, context: WorkerContext, folder: Path, *, how: str, is_paused: bool = False
) -> Ending:
    """Follow one attempt over a process that never ends by itself."""
    claimed = claim(context)
    assert claimed is not None
    command = [sys.executable, "-c", _PROGRAM, claimed.lease.job_id, how]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    child = TrainingChild(process)
    try:
        with lease_heartbeat(context, claimed.lease) as heartbeat:
            heartbeat.on_pause = child.ask_to_stop
            if is_paused:
                client.fine_tuning.jobs.pause(claimed.lease.job_id)
            ending = make_run(context, claimed, folder, heartbeat).supervise(child)
    finally:
        child.kill()
    assert not is_alive(process.pid)
    return ending


def test_training_that_stalls_is_ended_tried_again_and_fails_by_name(
    client: openai.OpenAI, context: WorkerContext, tmp_path: Path
) -> None:
    job_id = _queue(client, context)
    assert _attempt(client, context, tmp_path, how="hangs") is Ending.CRASHED
    (reported,) = [e for e in client.fine_tuning.jobs.list_events(job_id) if (e.data or {}).get("code")]  # type: ignore[attr-defined]
    assert reported.data["code"] == "stalled"  # type: ignore[index]
    assert reported.message == (
        "Training made no progress for 1 s after step 1, and was ended (LUTHIER_STALL_SECONDS). "
        "The job continues from its beginning."
    )
    assert client.fine_tuning.jobs.retrieve(job_id).status == "queued"
    assert _attempt(client, context, tmp_path, how="hangs") is Ending.FAILED
    failed = client.fine_tuning.jobs.retrieve(job_id)
    assert failed.status == "failed"
    assert failed.error is not None
    assert failed.error.code == "stalled"


@pytest.mark.parametrize("how", ["hangs", "steps"])
def test_a_pause_that_the_process_does_not_answer_ends_it_and_is_no_crash(
    client: openai.OpenAI, context: WorkerContext, tmp_path: Path, how: str
) -> None:
    job_id = _queue(client, context)
    assert _attempt(client, context, tmp_path, how=how, is_paused=True) is Ending.PAUSED
    with context.database.transaction() as session:
        job = session.get_one(Job, job_id)
        assert (job.status, job.num_crashes, job.lease_owner) == ("paused", 0, None)


def test_a_worker_that_stops_waits_for_a_save_as_long_as_is_set(
    client: openai.OpenAI, context: WorkerContext, tmp_path: Path
) -> None:
    context.settings = context.settings.model_copy(update={"stall_seconds": 600.0, "stop_seconds": 1.0})
    job_id = _queue(client, context)
    began = time.monotonic()
    stop = threading.Timer(1, context.stopping.set)
    stop.start()
    assert _attempt(client, context, tmp_path, how="hangs") is not Ending.FAILED
    assert time.monotonic() - began < 20
    assert (job_row(context, job_id).status, job_row(context, job_id).num_crashes) == ("queued", 0)


def _check_in_thread(context: WorkerContext, job_id: str) -> threading.Thread:
    thread = threading.Thread(target=prepare, args=(context, job_id))
    thread.start()
    return thread


def test_a_check_of_files_that_stalls_is_ended_tried_again_and_fails_by_name(
    client: openai.OpenAI, context: WorkerContext, pipe_for_a_file: None
) -> None:
    job_id = create_job(client)
    prepare(context, job_id)
    assert (job_row(context, job_id).status, job_row(context, job_id).num_crashes) == ("validating_files", 1)
    prepare(context, job_id)
    failed = client.fine_tuning.jobs.retrieve(job_id)
    assert failed.status == "failed"
    assert failed.error is not None
    assert failed.error.code == "stalled"
    assert "made no progress for 1 s" in failed.error.message
    assert not any(context.settings.runs_dir.rglob("*"))


@pytest.mark.parametrize("how", ["cancel", "stop"])
def test_a_check_of_files_ends_at_once_when_its_job_is_cancelled_or_its_worker_stops(
    client: openai.OpenAI, context: WorkerContext, pipe_for_a_file: None, how: str
) -> None:
    context.settings = context.settings.model_copy(update={"stall_seconds": 600.0, "control_seconds": 0.1})
    job_id = create_job(client)
    thread = _check_in_thread(context, job_id)
    wait_until(lambda: any(context.settings.runs_dir.rglob("question.json")))
    if how == "cancel":
        client.fine_tuning.jobs.cancel(job_id)
    else:
        context.stopping.set()
    thread.join(20)
    assert not thread.is_alive()
    job = job_row(context, job_id)
    assert (job.status, job.num_crashes, job.error) == (
        "cancelled" if how == "cancel" else "validating_files",
        0,
        None,
    )
    if how == "stop":
        assert job.lease_owner is None
    assert not any(context.settings.runs_dir.rglob("*"))
