"""Webhook endpoints over HTTP, with the SDK in strict mode where it has the call."""

from typing import Any

import openai
import pytest
from sqlalchemy import text

from luthier.core.settings import Settings
from luthier.webhooks.events import EVENT_TYPES
from tests.conftest import Api
from tests.receiver import Receiver

_FAILED = "fine_tuning.job.failed"
_GOOD: dict[str, Any] = {"name": "n", "url": "https://hooks.example/", "event_types": [_FAILED]}


@pytest.fixture
def settings(settings: Settings) -> Settings:
    changes = {"webhook_allow_http": True, "webhook_allowed_targets": "127.0.0.1"}
    return settings.model_copy(update=changes | {"webhook_timeout_seconds": 5})


def test_the_life_of_an_endpoint_in_the_sdks_words(api: Api, client: openai.OpenAI) -> None:
    made = client.webhooks.create(
        name="mine", url="https://hooks.example/a", event_types=["fine_tuning.job.failed"] * 2
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
    nulls = dict.fromkeys(_GOOD)
    assert api.ok("POST", f"/webhook_endpoints/{made.id}", nulls)["updated_at"] == earlier
    changed = client.webhooks.update(made.id, name="ours", event_types=["fine_tuning.job.succeeded"])
    assert (changed.name, changed.url) == ("ours", "https://hooks.example/a")
    assert changed.event_types == ["fine_tuning.job.succeeded"]
    assert changed.updated_at != earlier

    rotated = client.webhooks.rotate_secret(made.id)
    assert rotated.signing_secret not in (made.signing_secret, None)
    rotate = f"/webhook_endpoints/{made.id}/rotate_secret"
    bodiless = api.ok("POST", rotate, headers={"content-type": "application/json"})["signing_secret"]
    assert bodiless not in (rotated.signing_secret, made.signing_secret)

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
    made = [client.webhooks.create(**_GOOD).id for _ in range(5)]
    assert [endpoint.id for endpoint in client.webhooks.list(limit=2)] == made[::-1]
    answer = api.ok("GET", "/webhook_endpoints?limit=2")
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
    made = client.webhooks.create(**_GOOD)
    for path, body, param in (
        ("", _GOOD | {"event_types": [_FAILED, "batch.completed"]}, "event_types.1"),
        (f"/{made.id}", {"event_types": ["nope"]}, "event_types.0"),
        (f"/{made.id}/test", {"event_type": "batch.completed"}, "event_type"),
    ):
        *_, found, message = api.refused("POST", f"/webhook_endpoints{path}", body)
        assert found == param
        assert all(event_type in message for event_type in EVENT_TYPES)


def test_a_bad_create_names_its_field_and_makes_nothing(api: Api, client: openai.OpenAI) -> None:
    changes: list[tuple[dict[str, Any], str]] = [
        ({"url": "https://10.0.0.1/"}, "invalid_value"),
        ({"url": "http://169.254.169.254/latest"}, "invalid_value"),
        ({"url": "ftp://hooks.example/"}, "invalid_value"),
        ({"url": "nonsense"}, "invalid_value"),
        ({"url": 7}, "invalid_type"),
        ({"url": None}, "invalid_type"),
        ({"name": ""}, "invalid_value"),
        ({"event_types": []}, "invalid_value"),
        ({"event_types": "fine_tuning.job.failed"}, "invalid_type"),
        ({"secret": "mine"}, "unknown_parameter"),
    ]
    for change, code in changes:
        refused = api.refused("POST", "/webhook_endpoints", _GOOD | change)
        assert refused[:3] == (400, code, *change)
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
