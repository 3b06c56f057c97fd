"""Parts of the service that are away, slow or abused: no other part notices, nothing is lost or half-done."""

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import kombu.exceptions
import openai
import pytest

from db.tables import Attempt, Job
from luthier.core.errors import UnavailableError
from luthier.core.settings import Settings
from services.jobs import leases
from services.task_queue import TASK_NAME, TaskNotifier, make_celery
from tests.conftest import Api
from tests.rows import colour_rows, jsonl
from tests.training import create_short_job, fork_server, train_next
from worker.app import sweep
from worker.context import WorkerContext, make_context
from worker.maintenance import collect_garbage
from worker.processes import work
from worker.tasks.prepare import prepare


@pytest.fixture
def client(api: Api) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{api.base_url}/v1", api_key=api.key, max_retries=0)


@pytest.fixture
def context(settings: Settings, api: Api) -> WorkerContext:
    made = make_context(settings.model_copy(update={"sweep_seconds": 0.05}))
    made.notify = api.notified.append
    made.fork_server = fork_server()
    return made


def test_a_burst_of_requests_is_answered_whole(api: Api) -> None:
    async def burst() -> list[int]:
        async with httpx2.AsyncClient(headers=api.headers, timeout=30, limits=httpx2.Limits()) as http:
            url = f"{api.base_url}/v1/fine_tuning/jobs"
            return [
                answer.status_code for answer in await asyncio.gather(*(http.get(url) for _ in range(100)))
            ]

    assert set(asyncio.run(burst())) == {200}


@pytest.fixture
def silent_broker() -> Iterator[int]:
    """A listener that accepts and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_a_notification_to_a_broker_that_never_answers_returns_at_once(silent_broker: int) -> None:
    with pytest.raises(kombu.exceptions.OperationalError):
        # The first message imports what makes loggers, and pytest loops over those as the next test begins.
        make_celery("redis://127.0.0.1:1/0").send_task(TASK_NAME, retry=False, ignore_result=True)
    notifier = TaskNotifier(make_celery(f"redis://127.0.0.1:{silent_broker}/0"))
    ringing = threading.Thread(target=lambda: [notifier.notify(f"job-{n}") for n in range(500)], daemon=True)
    ringing.start()
    ringing.join(timeout=5)
    assert not ringing.is_alive()


def test_two_notifications_at_start_never_put_two_jobs_into_one_slot(
    client: openai.OpenAI, context: WorkerContext
) -> None:
    for _ in range(2):
        prepare(context, create_short_job(client))
    taken: list[object] = []
    barrier = threading.Barrier(2)

    def claim() -> None:
        barrier.wait()
        with context.database.transaction() as session:
            found = leases.claim_for_training(session, context.worker_id, 1, 30)
        if found is not None:
            taken.append(found)

    threads = [threading.Thread(target=claim) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 1


def _break(monkeypatch: pytest.MonkeyPatch, context: WorkerContext, name: str) -> None:
    def away(*_: object, **__: object) -> None:
        raise UnavailableError("The storage of files and models can't be used right now; try again.")

    monkeypatch.setattr(context.storage, name, away)


def _end_pause(context: WorkerContext, job_id: str) -> None:
    """Let the time come at which a job that was put off is tried again."""
    with context.database.transaction() as session:
        job = session.get_one(Job, job_id)
        assert job.not_before is not None
        job.not_before = None


def test_storage_that_is_away_costs_a_job_no_attempt(client: openai.OpenAI, context: WorkerContext) -> None:
    job_id = create_short_job(client)
    with pytest.MonkeyPatch.context() as broken:
        _break(broken, context, "fetch_file")
        for _ in range(5):
            prepare(context, job_id)
            _end_pause(context, job_id)
    job = client.fine_tuning.jobs.retrieve(job_id)
    assert (job.status, job.error) == ("validating_files", None)
    prepare(context, job_id)
    with pytest.MonkeyPatch.context() as broken:
        _break(broken, context, "fetch_folder")
        for _ in range(5):
            assert train_next(context)
            _end_pause(context, job_id)
    assert client.fine_tuning.jobs.retrieve(job_id).status == "queued"
    work(context)
    assert client.fine_tuning.jobs.retrieve(job_id).status == "succeeded"
    with context.database.transaction() as session:
        assert session.get_one(Job, job_id).num_crashes == 0
        outcomes = [
            a.outcome for a in session.query(Attempt).filter_by(job_id=job_id).order_by("lease_epoch")
        ]
    assert outcomes == [*["unavailable"] * 5, "prepared", *["unavailable"] * 5, "succeeded"]


def test_a_lease_is_kept_while_a_run_directory_is_filled(
    client: openai.OpenAI, context: WorkerContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = create_short_job(client)
    prepare(context, job_id)
    fetch = context.storage.fetch_folder

    def slow(prefix: str, destination: Path) -> object:
        deadline = time.monotonic() + 2 * context.settings.lease_seconds
        while time.monotonic() < deadline:
            sweep(context)
            time.sleep(0.3)
        return fetch(prefix, destination)

    monkeypatch.setattr(context.storage, "fetch_folder", slow)
    work(context)
    assert client.fine_tuning.jobs.retrieve(job_id).status == "succeeded"
    with context.database.transaction() as session:
        assert session.get_one(Job, job_id).lease_epoch == 2


def test_a_training_file_that_changed_in_storage_is_never_trained_on(
    client: openai.OpenAI, context: WorkerContext
) -> None:
    job_id = create_short_job(client)
    root = context.storage.local_root
    assert root is not None
    (stored,) = (path for path in root.rglob("file-*") if path.is_file())
    stored.write_bytes(stored.read_bytes().replace(b"red", b"rad"))
    work(context)
    job = client.fine_tuning.jobs.retrieve(job_id)
    assert job.status == "failed"
    assert job.error is not None
    assert job.error.code == "artifact_corrupt"


def test_bytes_that_could_not_be_deleted_are_deleted_later(
    api: Api, client: openai.OpenAI, context: WorkerContext
) -> None:
    file = client.files.create(file=("rows.jsonl", jsonl(colour_rows())), purpose="fine-tune")
    root = api.state.storage.local_root
    assert root is not None
    with pytest.MonkeyPatch.context() as broken:

        def away(*_: object) -> None:
            raise UnavailableError("away")

        broken.setattr(api.state.storage, "delete", away)
        assert client.files.delete(file.id).deleted
    assert [path for path in root.rglob("file-*") if path.is_file()]
    collect_garbage(context, grace_seconds=0)
    assert not [path for path in root.rglob("file-*") if path.is_file()]


def test_a_large_body_is_refused_on_every_route_and_read_for_a_known_key_alone(api: Api) -> None:
    content = b'{"a":"' + b"x" * 100_000 + b'"}'
    for path in ("/v1/fine_tuning/jobs", "/v1/keys", "/v1/nothing"):
        url = api.base_url + path
        answer = httpx2.post(url, content=content)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        answer = httpx2.post(url, content=content * 3, headers=api.headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "file_too_large")


def test_text_that_cannot_be_stored_is_400_and_not_logged(api: Api) -> None:
    jobs = f"{api.base_url}/v1/fine_tuning/jobs"
    file = '"training_file": "file-x"'
    cases = [
        ("GET", f"{api.base_url}/v1/files/%00", None),
        ("GET", f"{api.base_url}/v1/models/a%00", None),
        ("GET", f"{jobs}?after=%00", None),
        ("POST", jobs, f'{{"model": "a\\u0000", {file}}}'),
        ("POST", jobs, f'{{"model": "\\ud800", {file}}}'),
        ("POST", f"{api.base_url}/v1/keys", '{"name": "a\\u0000"}'),
        ("POST", f"{api.base_url}/v1/chat/completions", '{"model": "\\ud800", "messages": []}'),
        ("POST", f"{api.base_url}/v1/chat/completions", '{"model": "\\u0000", "messages": []}'),
    ]
    headers = api.headers | {"Content-Type": "application/json", "X-Stainless-Retry-Count": "9" * 5000}
    for method, url, content in cases:
        answer = httpx2.request(method, url, headers=headers, content=content)
        assert answer.status_code in (400, 404), (url, content, answer.text)
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
