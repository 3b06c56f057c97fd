"""Requests that come twice, one after the other or at once: one job and one act, in any order."""

import hashlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import httpx2
import openai
import pytest
from sqlalchemy import text

from db.queries import lock_key
from db.tables import ApiKey, IdempotencyKey, Job
from tests.conftest import Api, wait_until
from tests.rows import colour_rows, jsonl
from worker.context import make_context
from worker.tasks.prepare import prepare

_JOBS = "/fine_tuning/jobs"


@pytest.fixture
def body(api: Api) -> dict[str, Any]:
    return {"model": "tiny-llama", "training_file": api.upload_file(jsonl(colour_rows()))}


class LosesAnswers(httpx2.HTTPTransport):
    """A line that breaks after the service has done what it was asked, once for every request."""

    def __init__(self) -> None:
        super().__init__()
        self.num_lost = 0

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        answer = super().handle_request(request)
        if request.method == "POST" and request.headers["x-stainless-retry-count"] == "0":
            answer.read()
            self.num_lost += 1
            raise httpx2.ReadError("the line broke", request=request)
        return answer


def test_what_the_sdk_sends_again_after_a_lost_answer_is_done_once(
    api: Api, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openai.OpenAI, "_calculate_retry_timeout", lambda *_: 0.0)
    line = LosesAnswers()
    client = openai.OpenAI(
        base_url=f"{api.base_url}/v1", api_key=api.key, http_client=httpx2.Client(transport=line)
    )
    job = client.fine_tuning.jobs.create(**body, seed=1)
    assert [found.id for found in client.fine_tuning.jobs.list()] == [job.id]
    assert api.notified == [job.id]
    context = make_context(api.state.settings)
    context.notify = api.notified.append
    prepare(context, job.id)
    context.database.close()
    assert client.fine_tuning.jobs.pause(job.id).status == "paused"
    assert client.fine_tuning.jobs.resume(job.id).status == "queued"
    assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    assert line.num_lost == 4
    reported = [event.message for event in client.fine_tuning.jobs.list_events(job.id)][::-1]
    assert reported[-3:] == [
        "The job was paused at its beginning",
        "The job was resumed",
        "The job was cancelled",
    ]


def _at_once(requests: list[Callable[[], httpx2.Response]]) -> list[httpx2.Response]:
    barrier = threading.Barrier(len(requests))

    def send(request: Callable[[], httpx2.Response]) -> httpx2.Response:
        barrier.wait()
        return request()

    with ThreadPoolExecutor(len(requests)) as pool:
        return list(pool.map(send, requests))


def _create(api: Api, body: dict[str, Any], num_retries: int, **headers: str) -> httpx2.Response:
    headers = {"X-Stainless-Retry-Count": str(num_retries)} | headers
    return api.ask("POST", _JOBS, body=body, headers=headers)


def test_retries_of_a_create_at_once_make_one_job(api: Api, body: dict[str, Any]) -> None:
    for round_number in range(8):
        of_round = body | {"seed": round_number}
        answers = _at_once([partial(_create, api, of_round, n) for n in (1, 2, 1, 2)])
        assert {answer.status_code for answer in answers} == {200}
        assert len({answer.json()["id"] for answer in answers}) == 1
    assert len(api.ask("GET", _JOBS).json()["data"]) == 8


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["in order", "overtaken by its retry"])
def test_whichever_of_a_create_and_its_retry_comes_first_there_is_one_job(
    order: tuple[int, int], api: Api, body: dict[str, Any]
) -> None:
    first = _create(api, body | {"suffix": "probe"}, 0)
    assert first.status_code == 200
    with ThreadPoolExecutor(2) as pool:
        with api.state.database.transaction() as session:
            # The lock that twins queue at, held until both wait, in this order.
            key_id, project_id = session.query(ApiKey.id, ApiKey.project_id).one()
            digest = hashlib.sha256(httpx2.Request("POST", "http://x", json=body).content).hexdigest()
            lock_key(session, f"{project_id} POST /v1{_JOBS} {key_id} {digest}")
            sent = []
            for waiting, num_retries in enumerate(order, start=1):
                sent.append(pool.submit(_create, api, body, num_retries))
                wait_until(partial(_waits, api, waiting), seconds=10, what="it waits")
        made = {future.result().json()["id"] for future in sent}
    assert len(made) == 1
    # One that is meant as another is another.
    assert _create(api, body, 0).json()["id"] not in made


def _waits(api: Api, num_requests: int) -> bool:
    with api.state.database.transaction() as session:
        waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
        return bool(session.execute(text(waiting)).scalar_one() == num_requests)


def test_two_creates_that_are_both_meant_make_two_jobs(api: Api, body: dict[str, Any]) -> None:
    answers = _at_once([partial(_create, api, body, 0)] * 2)
    assert len({answer.json()["id"] for answer in answers}) == 2


def test_a_retry_is_reported_by_key_body_and_ten_minutes(api: Api, body: dict[str, Any]) -> None:
    made = _create(api, body, 0).json()["id"]
    assert _create(api, body, 1).json()["id"] == made
    assert _create(api, body | {"suffix": "x"}, 1).json()["id"] != made
    other = api.ask("POST", "/keys", body={"name": "other"}).json()["key"]
    theirs = _create(api, body, 1, Authorization=f"Bearer {other}").json()["id"]
    assert theirs != made
    keyed = _create(api, body, 0, **{"Idempotency-Key": "k"}).json()["id"]
    assert keyed not in {made, theirs}
    assert _create(api, body, 2, **{"Idempotency-Key": "k"}).json()["id"] == keyed
    with api.state.database.transaction() as session:
        session.query(IdempotencyKey).update({"created_at": text("created_at - interval '11 minutes'")})
    assert _create(api, body, 1).json()["id"] not in {made, theirs, keyed}
    assert _create(api, body, 2, **{"Idempotency-Key": "k"}).json()["id"] == keyed


def test_a_key_with_another_body_is_a_permanent_400(api: Api, body: dict[str, Any]) -> None:
    assert _create(api, body, 0, **{"Idempotency-Key": "k"}).status_code == 200
    answer = _create(api, body | {"suffix": "x"}, 0, **{"Idempotency-Key": "k"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "idempotency_key_reused")
    for key in ("", "k" * 256):
        answer = _create(api, body, 0, **{"Idempotency-Key": key})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "Idempotency-Key")


def test_a_create_that_failed_is_not_remembered(api: Api, body: dict[str, Any]) -> None:
    assert _create(api, body | {"model": "nope"}, 0, **{"Idempotency-Key": "k"}).status_code == 400
    assert _create(api, body, 0, **{"Idempotency-Key": "k"}).status_code == 200
    with api.state.database.transaction() as session:
        assert session.query(Job).count() == 1


def test_retries_of_a_cancel_at_once_do_it_once(api: Api, body: dict[str, Any]) -> None:
    job_id = _create(api, body, 0).json()["id"]
    url = f"{_JOBS}/{job_id}/cancel"
    # The first of them may never have arrived, so one of its retries does it.
    counts = [{"X-Stainless-Retry-Count": str(n)} for n in (1, 2, 1, 2)]
    answers = _at_once([partial(api.ask, "POST", url, headers=headers) for headers in counts])
    assert {answer.status_code for answer in answers} == {200}
    events = api.ask("GET", f"{_JOBS}/{job_id}/events").json()["data"]
    assert [event["message"] for event in events].count("The job was cancelled") == 1
