"""A broker that dies, or that somebody else writes to: real workers, an embedded Valkey."""

import json
import shutil
import signal
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
import redis
from pydantic import SecretStr

from luthier.cli.stack.processes import spawn
from luthier.cli.stack.valkey import open_valkey
from luthier.core.settings import Settings
from services.task_queue import QUEUE, TASK_NAME
from tests.conftest import wait_until
from tests.folders import TEMPORARY_FOLDER
from tests.training import create_short_job
from tests.workers import running_worker


@dataclass
class Broker:
    """An embedded Valkey."""

    url: str
    process: "subprocess.Popen[bytes]"
    client: redis.Redis


@pytest.fixture
def broker() -> Iterator[Broker]:
    folder = Path(tempfile.mkdtemp(prefix="vk-", dir=TEMPORARY_FOLDER))
    server = open_valkey(folder)
    spec = server.spec()
    process = spawn(spec.command, environment=spec.environment, log_path=folder / "log")
    try:
        wait_until(spec.is_ready, what="Valkey answers")
        yield Broker(server.url(), process, redis.Redis(unix_socket_path=str(server.socket_path)))
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(folder)


def _wait_for_success(client: openai.OpenAI, job_id: str) -> None:
    wait_until(lambda: client.fine_tuning.jobs.retrieve(job_id).finished_at, what="the job ends")
    job = client.fine_tuning.jobs.retrieve(job_id)
    assert job.status == "succeeded", job.error


def _with_broker(settings: Settings, broker: Broker) -> Settings:
    return settings.model_copy(update={"redis_url": SecretStr(broker.url)})


def test_jobs_start_by_the_sweep_when_the_broker_is_killed_and_never_comes_back(
    settings: Settings, client: openai.OpenAI, broker: Broker, tmp_path: Path
) -> None:
    with running_worker(_with_broker(settings, broker), tmp_path / "worker.log") as worker:
        wait_until(lambda: "Connected to" in worker.log(), what="the worker reads messages")
        broker.process.send_signal(signal.SIGKILL)
        broker.process.wait()
        _wait_for_success(client, create_short_job(client))
        assert worker.process.poll() is None


def test_a_worker_needs_no_broker(settings: Settings, client: openai.OpenAI, tmp_path: Path) -> None:
    with running_worker(settings, tmp_path / "worker.log", "--no-broker") as worker:
        _wait_for_success(client, create_short_job(client))
        worker.process.terminate()
        assert worker.process.wait(timeout=30) == 0


def _forged(headers: Any, body: Any) -> bytes:
    """A message as Celery writes one into its list in Redis, with whatever it says."""
    tag = uuid.uuid4().hex
    delivery = {"exchange": "", "routing_key": QUEUE}
    properties = {"correlation_id": tag, "delivery_mode": 2, "delivery_info": delivery, "priority": 0}
    return json.dumps(
        {
            "body": json.dumps(body),
            "content-encoding": "utf-8",
            "content-type": "application/json",
            "headers": headers,
            "properties": properties | {"body_encoding": None, "delivery_tag": tag},
        }
    ).encode()


def _hostile_messages(job_id: str) -> list[bytes]:
    embed: dict[str, Any] = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
    again = {"task": TASK_NAME, "args": ["job-x"], "kwargs": {}, "options": {}, "subtask_type": None}
    headers: dict[str, Any] = {"lang": "py", "task": TASK_NAME, "id": "1", "root_id": "1", "group": None}
    shutdown = {"method": "shutdown", "arguments": {}, "destination": None}
    return [
        _forged(headers | {"timelimit": [1, 1]}, [[job_id], {}, embed]),
        _forged(headers | {"timelimit": ["x", {}]}, [[job_id], {}, embed]),
        _forged(headers | {"eta": "2099-01-01T00:00:00", "expires": "1999-01-01T00:00:00"}, [[], {}, embed]),
        _forged(headers | {"eta": "never", "expires": []}, [[job_id], {}, embed]),
        _forged(
            headers, [[job_id], {}, embed | {"callbacks": [again] * 9, "chain": [again], "chord": again}]
        ),
        _forged(headers, [[{"job": 1}, 2, 3], {"x": 1}, embed]),
        _forged(headers, "no list"),
        _forged(headers | {"task": "celery.group"}, [[], {}, embed]),
        _forged({"task": ["celery.chain"]}, [[], {}, embed]),
        _forged({"task": "os.system"}, [["true"], {}, embed]),
        _forged({}, {"task": TASK_NAME, "args": [job_id], "kwargs": {}, "id": "2", "eta": "x"}),
        _forged(None, None),
        _forged("headers", []),
        _forged(headers, shutdown),
        *[_forged(headers, [[job_id], {}, embed])] * 5,
        b"no message",
        b"{}",
        b"\x80\x04cposix\nsystem\n.",
    ]


def test_forged_doubled_and_hostile_messages_harm_neither_job_nor_worker(
    settings: Settings, client: openai.OpenAI, broker: Broker, tmp_path: Path
) -> None:
    pidbox = {"method": "shutdown", "arguments": {}, "destination": None, "pattern": None, "matcher": None}
    with running_worker(_with_broker(settings, broker), tmp_path / "worker.log") as worker:
        wait_until(lambda: "Connected to" in worker.log(), what="the worker reads messages")
        job_id = create_short_job(client)
        for message in _hostile_messages(job_id):
            broker.client.lpush(QUEUE, message)
        broker.client.publish("/0.celery.pidbox", _forged({}, pidbox))
        _wait_for_success(client, job_id)
        assert worker.process.poll() is None
        messages = [event.message for event in client.fine_tuning.jobs.list_events(job_id, limit=100)]
        assert messages.count("Fine-tuning job started") == 1
        assert not [message for message in messages if "ended by signal" in message]
        # What came after them is read: the worker is no deaf one.
        wait_until(lambda: broker.client.llen(QUEUE) == 0, what="the queue is empty")
