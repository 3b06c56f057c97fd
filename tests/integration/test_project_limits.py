"""What one project may have open at the same time: event streams, and tests of webhooks."""

import asyncio
import json
import threading
from contextlib import ExitStack
from typing import Any

import httpx2
import pytest

from api.concurrency import ProjectLimiter
from luthier.webhooks import sending
from luthier.webhooks.events import Outcome
from tests.conftest import Api, wait_until
from tests.rows import colour_rows, jsonl


@pytest.fixture
def job_id(api: Api) -> str:
    return api.create_job(api.upload_file(jsonl(colour_rows())))["id"]


def _stream(api: Api, job_id: str, headers: dict[str, str] | None = None) -> Any:
    url = f"{api.base_url}/v1/fine_tuning/jobs/{job_id}/events?stream=true"
    return httpx2.stream("GET", url, headers=headers or api.headers, timeout=20)


def test_event_streams_of_a_project_are_limited_and_places_are_given_back(api: Api, job_id: str) -> None:
    object.__setattr__(api.state, "event_streams", ProjectLimiter(3, what="event streams"))
    with ExitStack() as opened:
        for _ in range(3):
            answer = opened.enter_context(_stream(api, job_id))
            assert answer.status_code == 200
        with _stream(api, job_id) as refused:
            assert refused.status_code == 429
            assert "3 event streams" in json.loads(refused.read())["error"]["message"]

    def is_taken() -> bool:
        with _stream(api, job_id) as again:
            return again.status_code == 200

    wait_until(is_taken, what="places are given back")


def test_a_stream_ends_with_its_key(api: Api, job_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.streaming.event_stream._POLL_SECONDS", 0.1)
    made = api.ask("POST", "/keys", body={"name": "a"}).json()
    with _stream(api, job_id, {"Authorization": f"Bearer {made['key']}"}) as stream:
        lines = stream.iter_lines()
        assert next(lines).startswith("id: ")
        assert api.ask("DELETE", f"/keys/{made['id']}").status_code == 200
        *_, last = [line for line in lines if line]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "invalid_api_key"


def test_a_project_tests_one_webhook_at_a_time(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, continue_from = threading.Event(), threading.Event()

    async def send(*_: Any, **__: Any) -> Outcome:
        begun.set()
        await asyncio.to_thread(continue_from.wait, 20)
        return Outcome(status_code=500)

    monkeypatch.setattr("api.routes.webhooks.send", send)
    body = {"name": "a", "url": "https://hooks.example/a", "event_types": ["fine_tuning.job.succeeded"]}
    path = f"/webhook_endpoints/{api.ask('POST', '/webhook_endpoints', body=body).json()['id']}/test"
    event = {"event_type": "fine_tuning.job.succeeded"}
    answers: list[httpx2.Response] = []
    first = threading.Thread(target=lambda: answers.append(api.ask("POST", path, body=event, timeout=30)))
    first.start()
    begun.wait(20)
    assert api.ask("POST", path, body=event).status_code == 429
    continue_from.set()
    first.join(20)
    # An answer that is no success is none.
    assert (answers[0].json()["status_code"], answers[0].json()["success"]) == (500, True)
    assert api.ask("POST", path, body=event).status_code == 200


def test_internal_and_unknown_names_get_the_same_answer(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    real = sending.socket.getaddrinfo

    def resolve(host: str, *options: Any, **more: Any) -> Any:
        if host == "internal.example":
            return [(0, 0, 0, "", ("10.0.0.1", 443))]
        if host == "nowhere.example":
            raise sending.socket.gaierror("no such name")
        return real(host, *options, **more)

    monkeypatch.setattr(sending.socket, "getaddrinfo", resolve)
    reported = set()
    for host in ("internal.example", "nowhere.example"):
        event_types = ["fine_tuning.job.succeeded"]
        body = {"name": "a", "url": f"https://{host}/a", "event_types": event_types}
        made = api.ask("POST", "/webhook_endpoints", body=body).json()
        event = {"event_type": event_types[0]}
        tested = api.ask("POST", f"/webhook_endpoints/{made['id']}/test", body=event)
        assert tested.status_code == 400
        reported.add(tested.json()["error"]["message"])
    assert len(reported) == 1
