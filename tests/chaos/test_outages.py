"""Parts of the service that are away, slow or abused: no other part notices, nothing is lost or half-done."""

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx2
import kombu.exceptions
import pytest

from luthier.core.errors import UnavailableError
from luthier.core.settings import Settings
from luthier.storage.store import Storage
from services.jobs import leases
from services.task_queue import TASK_NAME, TaskNotifier, make_celery
from tests.conftest import Api
from tests.training import Jobs, make_worker, train_next
from worker.app import sweep
from worker.context import WorkerContext
from worker.maintenance import collect_garbage
from worker.processes import work
from worker.tasks.prepare import prepare


@pytest.fixture
def context(settings: Settings, api: Api) -> WorkerContext:
    return make_worker(settings.model_copy(update={"sweep_seconds": 0.05}), api)


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


def test_two_notifications_at_start_never_put_two_jobs_into_one_slot(jobs: Jobs) -> None:
    for _ in range(2):
        jobs.prepared()
    taken: list[object] = []
    barrier = threading.Barrier(2)

    def claim() -> None:
        barrier.wait()
        with jobs.context.database.transaction() as session:
            found = leases.claim_for_training(session, jobs.context.worker_id, 1, 30)
        if found is not None:
            taken.append(found)

    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(claim) for _ in range(2)]:
            future.result()
    assert len(taken) == 1


@contextmanager
def _without(storage: Storage, name: str) -> Iterator[None]:
    """One of storage's verbs can't be used."""

    def away(*_: object, **__: object) -> None:
        raise UnavailableError("The storage of files and models can't be used right now; try again.")

    with pytest.MonkeyPatch.context() as broken:
        broken.setattr(storage, name, away)
        yield


def test_storage_that_is_away_costs_a_job_no_attempt(jobs: Jobs, context: WorkerContext) -> None:
    job_id = jobs.create()
    with _without(context.storage, "fetch_file"):
        for _ in range(5):
            prepare(context, job_id)
            assert jobs.row(job_id).not_before is not None
            jobs.end_pause(job_id)
    assert (jobs.status(job_id), jobs.get(job_id).error) == ("validating_files", None)
    prepare(context, job_id)
    with _without(context.storage, "fetch_folder"):
        for _ in range(5):
            assert train_next(context)
            assert jobs.row(job_id).not_before is not None
            jobs.end_pause(job_id)
    assert jobs.status(job_id) == "queued"
    work(context)
    assert (jobs.status(job_id), jobs.row(job_id).num_crashes) == ("succeeded", 0)
    away = ["unavailable"] * 5
    assert jobs.outcomes(job_id) == [*away, "prepared", *away, "succeeded"]


def test_a_lease_is_kept_while_a_run_directory_is_filled(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = jobs.prepared()
    fetch = jobs.context.storage.fetch_folder

    def slow(prefix: str, destination: Path) -> object:
        deadline = time.monotonic() + 2 * jobs.context.settings.lease_seconds
        while time.monotonic() < deadline:
            sweep(jobs.context)
            time.sleep(0.3)
        return fetch(prefix, destination)

    monkeypatch.setattr(jobs.context.storage, "fetch_folder", slow)
    work(jobs.context)
    assert (jobs.status(job_id), jobs.row(job_id).lease_epoch) == ("succeeded", 2)


def test_a_training_file_that_changed_in_storage_is_never_trained_on(jobs: Jobs) -> None:
    job_id = jobs.create()
    root = jobs.context.storage.local_root
    (stored,) = (path for path in root.rglob("file-*") if path.is_file())
    stored.write_bytes(stored.read_bytes().replace(b"red", b"rad"))
    work(jobs.context)
    assert jobs.error(job_id).code == "artifact_corrupt"


def test_bytes_that_could_not_be_deleted_are_deleted_later(api: Api, jobs: Jobs) -> None:
    file_id = jobs.upload()
    with _without(api.state.storage, "delete"):
        assert jobs.client.files.delete(file_id).deleted
    assert file_id in api.stored_objects()
    collect_garbage(jobs.context, grace_seconds=0)
    assert api.stored_objects() == []


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
