"""What is kept of webhooks: sealed secrets that only the key opens, and deliveries for a while."""

from datetime import timedelta

import openai
import pytest
from alembic import command
from pydantic import SecretStr
from sqlalchemy import text
from structlog.testing import capture_logs

from db.migrate import alembic_config
from db.session import Database
from db.tables import WebhookDelivery
from luthier.core.errors import SecretKeyError
from luthier.core.settings import Settings
from luthier.webhooks.sealing import Sealer, new_secret_key
from services.webhooks.endpoints import reseal
from tests.conftest import serve_api
from tests.integration.hooks import Hooks
from worker.maintenance import collect_garbage


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"webhook_allow_http": True, "webhook_allowed_targets": "127.0.0.1"})


def test_finished_deliveries_are_kept_for_as_long_as_is_set_and_no_longer(hooks: Hooks) -> None:
    hooks.cancel_job()
    hooks.wind("created_at = now() - interval '60 days'")
    collect_garbage(hooks.context, grace_seconds=0)
    assert hooks.delivery().finished_at is None, "what still waits is kept, however old"
    assert hooks.deliver() == 1
    hooks.wind("finished_at = now() - interval '29 days'")
    collect_garbage(hooks.context, grace_seconds=0)
    assert hooks.delivery().outcome == "delivered"
    hooks.wind("finished_at = now() - interval '31 days'")
    collect_garbage(hooks.context, grace_seconds=0)
    with hooks.context.database.transaction() as session:
        assert session.query(WebhookDelivery).count() == 0


def test_a_secret_that_the_key_does_not_open_signs_nothing_until_it_does(hooks: Hooks) -> None:
    hooks.cancel_job()
    right = hooks.context.sealer
    for wrong, reported in ((Sealer(new_secret_key()), "another key"), (Sealer(""), "is not set")):
        hooks.context.sealer = wrong
        assert hooks.deliver() == 1
        row = hooks.delivery()
        assert (row.finished_at, row.last_status_code) == (None, None)
        assert reported in (row.last_error or "")
        assert "LUTHIER_SECRET_KEY" in (row.last_error or "")
        hooks.wind("next_try_at = now()")
    assert hooks.receiver.received == []
    hooks.context.sealer = right
    assert hooks.deliver() == 1
    (request,) = hooks.receiver.received
    hooks.unwrap(request)


def test_a_start_seals_secrets_that_were_plain_and_those_of_an_older_key(hooks: Hooks) -> None:
    rotated = hooks.client.webhooks.rotate_secret(hooks.endpoint.id, keep_old_secret_active_for_24_hours=True)
    plain = {"new": rotated.signing_secret, "old": hooks.endpoint.signing_secret}
    hooks.execute("UPDATE webhook_endpoints SET secret = :new, old_secret = :old", **plain)
    older, newer = new_secret_key(), new_secret_key()
    for keys in (older, f"{newer},{older}"):
        with hooks.context.database.transaction() as session:
            assert reseal(session, Sealer(keys)) == 1
            stored = session.execute(text("SELECT * FROM webhook_endpoints")).all()
            assert "whsec_" not in str(stored)
            assert reseal(session, Sealer(keys)) == 0
            assert session.execute(text("SELECT * FROM webhook_endpoints")).all() == stored
    for sealer, reported in ((Sealer(older), "another key"), (Sealer(""), "is not set")):
        with pytest.raises(SecretKeyError, match=reported), hooks.context.database.transaction() as session:
            reseal(session, sealer)
    hooks.context.sealer = Sealer(newer)
    hooks.cancel_job()
    assert hooks.deliver() == 1
    (request,) = hooks.receiver.received
    for secret in plain.values():
        hooks.unwrap(request, secret)


def test_an_old_secret_that_the_key_does_not_open_holds_up_nothing(hooks: Hooks) -> None:
    lost = Sealer(new_secret_key())
    hooks.execute("UPDATE webhook_endpoints SET secret = :lost", lost=lost.seal("whsec_"))
    rotated = hooks.client.webhooks.rotate_secret(hooks.endpoint.id, keep_old_secret_active_for_24_hours=True)
    find_old = text("SELECT old_secret, old_secret_expires_at FROM webhook_endpoints")
    with hooks.context.database.engine.begin() as connection:
        assert tuple(connection.execute(find_old).one()) == (None, None)
    hold_old = "UPDATE webhook_endpoints SET old_secret = :old, old_secret_expires_at = now() + :left"
    hooks.execute(hold_old, old=lost.seal("whsec_"), left=timedelta(hours=1))
    hooks.cancel_job()
    assert hooks.deliver() == 1
    (request,) = hooks.receiver.received
    hooks.unwrap(request, rotated.signing_secret)
    assert " " not in request.headers["webhook-signature"], "the lost one signs nothing"
    with hooks.context.database.transaction() as session:
        session.execute(text("UPDATE webhook_endpoints SET old_secret_expires_at = now()"))
        assert reseal(session, hooks.context.sealer) == 1
        assert tuple(session.execute(find_old).one()) == (None, None)


def test_an_erased_secret_is_reported_to_project_and_operator(hooks: Hooks) -> None:
    hooks.execute("UPDATE webhook_endpoints SET secret = '', old_secret = NULL")
    with pytest.raises(
        openai.BadRequestError, match=f"{hooks.endpoint.id} has no signing secret.*rotate"
    ) as refused:
        hooks.client.webhooks.test(hooks.endpoint.id, event_type="fine_tuning.job.failed")
    assert refused.value.param == "webhook_endpoint_id"
    hooks.cancel_job()
    with capture_logs() as logs:
        assert hooks.deliver() == 1
    assert [
        (log["log_level"], log["delivery_id"]) for log in logs if log["event"] == "webhook not signed"
    ] == [("warning", hooks.delivery().id)]
    assert hooks.receiver.received == []


def test_the_way_down_refuses_while_secrets_are_sealed(hooks: Hooks) -> None:
    with (
        pytest.raises(RuntimeError, match=f"Delete these endpoints first.*{hooks.endpoint.id}"),
        hooks.context.database.engine.begin() as connection,
    ):
        command.downgrade(alembic_config(connection), "0008")
    hooks.client.webhooks.delete(hooks.endpoint.id)
    with hooks.context.database.engine.begin() as connection:
        command.downgrade(alembic_config(connection), "0008")
        command.upgrade(alembic_config(connection), "head")


def test_without_a_secret_key_no_endpoint_is_made(settings: Settings, database: Database) -> None:
    keyless = settings.model_copy(update={"secret_key": SecretStr("")})
    with serve_api(keyless, database) as api:
        body = {"name": "n", "url": "https://hooks.example/", "event_types": ["fine_tuning.job.failed"]}
        answer = api.ask("POST", "/webhook_endpoints", body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "secret_key")
    assert "LUTHIER_SECRET_KEY" in answer.json()["error"]["message"]
    assert answer.headers["x-should-retry"] == "false"
