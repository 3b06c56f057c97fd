"""kill -9 of parts of the real service at random moments: each job ends once, and nothing is left over."""

import contextlib
import os
import random
import signal
import time
from collections.abc import Iterator

import openai
import pytest

from tests.conftest import wait_until
from tests.rows import colour_rows, jsonl
from tests.stack import Stack, tiny_stack
from tests.tiny import BASE_ID

_PARTS = {
    "worker": "-m\0worker",
    "api": "-m\0api",
    # And not the process that measures the device's speed.
    "training process": "-m\0luthier.training\0/",
    "inference": "luthier.inference.server",
}
_NUM_KILLS = 10
# Always enough for a training process to be killed, and no queue that outlasts the kills.
_NUM_WAITING = 3
# A job whose worker was lost again and again waits longer each time.
_LAST_JOBS_SECONDS = 400.0
_TERMINAL = ("succeeded", "failed", "cancelled")


@pytest.fixture
def stack() -> Iterator[Stack]:
    with tiny_stack(
        LUTHIER_LEASE_SECONDS="3",
        LUTHIER_HEARTBEAT_SECONDS="0.5",
        LUTHIER_SWEEP_SECONDS="0.5",
        LUTHIER_ORPHAN_SECONDS="5",
        # A kill is to meet a training process, and not one that waits.
        LUTHIER_WARM_SPARE_SECONDS="0",
        # How often a job is killed is not what is tested.
        LUTHIER_MAX_ATTEMPTS="100",
    ) as made:
        yield made


def _create(client: openai.OpenAI) -> str | None:
    """Create a job; None when it was not acknowledged."""
    with contextlib.suppress(openai.APIConnectionError, openai.InternalServerError):
        file = client.files.create(file=("rows.jsonl", jsonl(colour_rows(24))), purpose="fine-tune")
        return client.fine_tuning.jobs.create(
            model=BASE_ID,
            training_file=file.id,
            seed=1,
            hyperparameters={"n_epochs": 2, "batch_size": 4},
            extra_body={"training": {"save_every_steps": 2, "precision": "float32"}},
        ).id
    return None


def _kill(stack: Stack, part: str) -> bool:
    """Kill a part now; False when it does not run at the moment."""
    try:
        os.kill(stack.pid_of(_PARTS[part]), signal.SIGKILL)
    except (AssertionError, ProcessLookupError, FileNotFoundError):
        return False
    return True


def _has_ended(client: openai.OpenAI, job_id: str) -> bool:
    with contextlib.suppress(openai.APIError):
        return client.fine_tuning.jobs.retrieve(job_id).status in _TERMINAL
    return False


def _left_over(stack: Stack, client: openai.OpenAI, job_ids: list[str]) -> list[str]:
    """Return what is in run directories, caches and storage and belongs to no file, model or result."""
    objects = stack.home / "objects"
    files = {file.id for file in client.files.list(limit=1000)}
    kept = ("artifact", "checkpoints")
    found = [str(path) for path in (stack.home / "runs").rglob("*") if path.is_file()]
    found += [str(path) for path in (stack.home / "cache").rglob("*.part")]
    for path in objects.rglob("*"):
        if not path.is_file():
            continue
        below = path.relative_to(objects).parts
        is_known = below[2] == "files" and below[3] in files
        if below[2] == "jobs" and below[3] in job_ids:
            is_known = below[5] in kept or below[5] == "step_metrics.csv"
        if not is_known or "#" in path.name:
            found.append(str(path))
    return found


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_every_acknowledged_job_ends_once_and_nothing_is_left_over(stack: Stack) -> None:
    seed = random.randrange(10**6)
    print("seed", seed)
    moments, client, job_ids = random.Random(seed), stack.client(timeout=20), []
    parts = [part for part in _PARTS for _ in range(_NUM_KILLS)]
    # Ten losses of a worker in a row, without a step between them, would rightly fail a job.
    moments.shuffle(parts)
    for part in parts:
        if sum(not _has_ended(client, job_id) for job_id in job_ids[-_NUM_WAITING:]) < _NUM_WAITING:
            job_id = _create(client)
            if job_id is not None:
                job_ids.append(job_id)
        time.sleep(moments.uniform(0.0, 3.0))
        wait_until(lambda part=part: _kill(stack, part), f"{part} runs")
        wait_until(lambda: _is_answering(client), "the API answers")
    print(len(job_ids), "jobs acknowledged")
    assert job_ids
    # One whose answer was lost is a job as well.
    found = {job.id for job in client.fine_tuning.jobs.list(limit=100)}
    assert found >= set(job_ids)
    job_ids = sorted(found)
    deadline = time.monotonic() + _LAST_JOBS_SECONDS
    while unended := [job_id for job_id in job_ids if not _has_ended(client, job_id)]:
        assert time.monotonic() < deadline, f"not ended: {unended}"
        time.sleep(0.5)
    for job_id in job_ids:
        job = client.fine_tuning.jobs.retrieve(job_id)
        assert job.status == "succeeded", job.error
        messages = [e.message for e in client.fine_tuning.jobs.list_events(job_id, limit=100)]
        assert messages.count("The job has successfully completed") == 1
    # The orphan of an upload that was never acknowledged, as the API's end between bytes and row leaves it.
    (some,) = {path.parent for path in (stack.home / "objects").rglob("files/file-*")}
    (some / "file-without-a-row").write_bytes(b"{}")
    (some / "file-unfinished#123").write_bytes(b"{}")
    wait_until(lambda: _left_over(stack, client, job_ids) == [], "nothing is left over")


def _is_answering(client: openai.OpenAI) -> bool:
    with contextlib.suppress(openai.APIError):
        client.models.list()
        return True
    return False
