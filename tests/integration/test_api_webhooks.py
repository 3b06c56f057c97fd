"""Webhook endpoints over HTTP, with the SDK in strict mode where it has the call."""

from typing import Any

import httpx2
import openai
import pytest
from sqlalchemy import text

from luthier.core.settings import Settings
from luthier.webhooks.events import EVENT_TYPES
from tests.conftest import Api
from tests.receiver import Receiver


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(
        update={
            "webhook_allow_http": True,
            "webhook_allowed_targets": "127.0.0.1",
            "webhook_timeout_seconds": 5,
        }
    )


def _post(api: Api, path: str, body: Any, key: str | None = None) -> httpx2.Response:
    headers = {"Authorization": f"Bearer {key or api.key}"}
    return httpx2.post(f"{api.base_url}/v1{path}", headers=headers, json=body)


def test_the_life_of_an_endpoint_in_the_sdks_words(api: Api, client: openai.OpenAI) -> None:
    made = client.webhooks.create(
        name="mine",
        url="https://hooks.example/a",
        event_types=["fine_tuning.job.failed", "fine_tuning.job.failed"],
    )
    assert made.signing_secret.startswith("whsec_")
    assert made.event_types == ["fine_tuning.job.failed"]
    assert made.signing_secret[-4:] in str(made.signing_secret_hint)
    seen = client.webhooks.retrieve(made.id)
    assert seen.model_dump() == made.model_dump(exclude={"signing_secret"})
    raw = client.webhooks.with_raw_response.retrieve(made.id).text
    assert made.signing_secret not in raw

    with api.state.database.engine.begin() as connection:
        connection.execute(text("UPDATE webhook_endpoints SET updated_at = now() - interval '1 hour'"))
    earlier = client.webhooks.retrieve(made.id).updated_at
    assert client.webhooks.update(made.id, name="mine").updated_at == earlier
    nulls = _post(api, f"/webhook_endpoints/{made.id}", {"name": None, "url": None, "event_types": None})
    assert nulls.json()["updated_at"] == earlier
    changed = client.webhooks.update(made.id, name="ours", event_types=["fine_tuning.job.succeeded"])
    assert (changed.name, changed.event_types, changed.url) == (
        "ours",
        ["fine_tuning.job.succeeded"],
        "https://hooks.example/a",
    )
    assert changed.updated_at != earlier

    rotated = client.webhooks.rotate_secret(made.id)
    assert rotated.signing_secret not in (made.signing_secret, None)
    bodiless = httpx2.post(
        f"{api.base_url}/v1/webhook_endpoints/{made.id}/rotate_secret",
        headers={**api.headers, "content-type": "application/json"},
    )
    assert bodiless.json()["signing_secret"] not in (rotated.signing_secret, made.signing_secret)

    with api.state.database.engine.connect() as connection:
        dump = str(connection.exec_driver_sql("SELECT * FROM webhook_endpoints").all())
    assert "whsec_" not in dump
    deleted = client.webhooks.delete(made.id)
    assert (deleted.id, deleted.deleted, deleted.object) == (made.id, True, "webhook_endpoint.deleted")
    with pytest.raises(openai.NotFoundError):
        client.webhooks.retrieve(made.id)
    assert client.webhooks.list().data == []
    with api.state.database.engine.connect() as connection:
        secrets = connection.execute(text("SELECT secret, secret_hint, old_secret FROM webhook_endpoints"))
        assert secrets.all() == [("", "", None)]


def test_endpoints_are_paged_newest_first(api: Api, client: openai.OpenAI) -> None:
    made = [
        client.webhooks.create(
            name=str(n), url="https://hooks.example/", event_types=["fine_tuning.job.failed"]
        ).id
        for n in range(5)
    ]
    assert [endpoint.id for endpoint in client.webhooks.list(limit=2)] == made[::-1]
    answer = httpx2.get(f"{api.base_url}/v1/webhook_endpoints?limit=2", headers=api.headers).json()
    assert (answer["first_id"], answer["last_id"], answer["has_more"]) == (made[4], made[3], True)
    assert client.webhooks.list(limit=0).data == []
    with pytest.raises(openai.BadRequestError) as caught:
        client.webhooks.list(after="we_nope")
    assert caught.value.param == "after"
    client.webhooks.delete(made[3])
    assert [endpoint.id for endpoint in client.webhooks.list(after=made[3])] == made[2::-1]


def test_the_types_are_listed_and_another_one_is_a_400_that_lists_them(
    api: Api, client: openai.OpenAI
) -> None:
    assert client.webhooks.event_types.list().data == list(EVENT_TYPES)
    good = {"name": "n", "url": "https://hooks.example/", "event_types": ["fine_tuning.job.failed"]}
    made = _post(api, "/webhook_endpoints", good).json()
    for path, body, param in (
        ("", good | {"event_types": ["fine_tuning.job.failed", "batch.completed"]}, "event_types.1"),
        (f"/{made['id']}", {"event_types": ["nope"]}, "event_types.0"),
        (f"/{made['id']}/test", {"event_type": "batch.completed"}, "event_type"),
    ):
        error = _post(api, f"/webhook_endpoints{path}", body).json()["error"]
        assert error["param"] == param
        assert all(event_type in error["message"] for event_type in EVENT_TYPES)


_REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"url": "https://10.0.0.1/"}, "url", "invalid_value"),
    ({"url": "http://169.254.169.254/latest"}, "url", "invalid_value"),
    ({"url": "ftp://hooks.example/"}, "url", "invalid_value"),
    ({"url": "nonsense"}, "url", "invalid_value"),
    ({"url": 7}, "url", "invalid_type"),
    ({"url": None}, "url", "invalid_type"),
    ({"name": ""}, "name", "invalid_value"),
    ({"event_types": []}, "event_types", "invalid_value"),
    ({"event_types": "fine_tuning.job.failed"}, "event_types", "invalid_type"),
    ({"secret": "mine"}, "secret", "unknown_parameter"),
]


def test_a_bad_create_names_its_field_and_makes_nothing(api: Api, client: openai.OpenAI) -> None:
    good = {"name": "n", "url": "https://hooks.example/", "event_types": ["fine_tuning.job.failed"]}
    for change, param, code in _REFUSED:
        answer = _post(api, "/webhook_endpoints", good | change)
        error = answer.json()["error"]
        assert (answer.status_code, error["param"], error["code"]) == (400, param, code), error
    assert client.webhooks.list().data == []


def test_a_test_is_sent_at_once_and_returns_the_status(client: openai.OpenAI, receiver: Receiver) -> None:
    made = client.webhooks.create(name="n", url=receiver.url, event_types=["fine_tuning.job.succeeded"])
    for status in (204, 500, 302):
        receiver.statuses = [status]
        result = client.webhooks.test(made.id, event_type="fine_tuning.job.cancelled")
        assert (result.status_code, result.success) == (status, True)
        assert (result.webhook_endpoint_id, result.event_type) == (made.id, "fine_tuning.job.cancelled")
        request = receiver.received[-1]
        event = client.webhooks.unwrap(request.body, request.headers, secret=made.signing_secret)
        assert event.type == "fine_tuning.job.cancelled"
    assert len(receiver.received) == 3, "a test is sent a single time"
    assert client.webhooks.retrieve(made.id).updated_at == made.updated_at


def test_a_test_without_a_receiver_is_a_400_in_our_own_words(
    client: openai.OpenAI, receiver: Receiver
) -> None:
    # Nothing listens on port 1, and this name resolves nowhere.
    for url in ("http://127.0.0.1:1/", "https://nowhere.invalid/"):
        made = client.webhooks.create(name="n", url=url, event_types=["fine_tuning.job.failed"])
        with pytest.raises(openai.BadRequestError) as caught:
            client.webhooks.test(made.id, event_type="fine_tuning.job.failed")
        assert caught.value.code == "webhook_unreachable"


def test_another_project_sees_none_of_it(api: Api, client: openai.OpenAI) -> None:
    made = client.webhooks.create(
        name="n", url="https://hooks.example/", event_types=["fine_tuning.job.failed"]
    )
    key = _post(api, "/keys", {"name": "other", "project": "other"}).json()["key"]
    other = client.copy(api_key=key)
    assert other.webhooks.list().data == []
    for act in (
        lambda: other.webhooks.retrieve(made.id),
        lambda: other.webhooks.update(made.id, name="x"),
        lambda: other.webhooks.delete(made.id),
        lambda: other.webhooks.rotate_secret(made.id),
        lambda: other.webhooks.test(made.id, event_type="fine_tuning.job.failed"),
    ):
        with pytest.raises(openai.NotFoundError):
            act()
    assert client.webhooks.retrieve(made.id).name == "n"
