"""A job's end on its way to a receiver: real PostgreSQL, a real receiver, the real SDK that unwraps it."""

import socket
import threading
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from sqlalchemy import text

from db.tables import Job, WebhookDelivery
from luthier.core.errors import (
    InvalidTrainingFileError,
    UnavailableError,
    WorkerCrashedError,
)
from luthier.core.settings import Settings
from luthier.core.states import JobStatus
from luthier.webhooks.events import Outcome
from services.accounts.auth import Principal
from services.jobs import leases
from services.jobs.leases import Lease
from services.webhooks import deliveries, endpoints
from tests.conftest import Api, wait_until
from tests.integration.hooks import create_job, the_delivery, wind
from tests.integration.training_script import run_script
from tests.receiver import Receiver
from worker import webhook_dispatcher
from worker.app import sweep
from worker.context import Watch, WorkerContext
from worker.tasks.prepare import prepare
from worker.webhook_dispatcher import deliver_due


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(
        update={"webhook_allow_http": True, "webhook_allowed_targets": "127.0.0.1", "max_attempts": 1}
    )


def _take(context: WorkerContext, job_id: str, seconds: float = 60) -> Lease:
    with context.database.transaction() as session:
        lease = leases.claim_for_preparing(session, job_id, context.worker_id, seconds)
    assert lease is not None
    return lease


def test_a_job_that_succeeds_is_reported_and_the_sdk_unwraps_it(
    client: openai.OpenAI, context: WorkerContext, receiver: Receiver, endpoint: Any, tmp_path: Path
) -> None:
    job_id = create_job(client)
    prepare(context, job_id)
    assert deliver_due(context) == 0
    run_script(context, tmp_path, lambda script: script.start().epoch(1, 2.0).finish(1))

    assert deliver_due(context) == 1
    assert deliver_due(context) == 0
    (request,) = receiver.received
    event = client.webhooks.unwrap(request.body, request.headers, secret=endpoint.signing_secret)
    assert event.type == "fine_tuning.job.succeeded"
    assert event.data.id == job_id
    job = client.fine_tuning.jobs.retrieve(job_id)
    assert (job.status, job.finished_at) == ("succeeded", event.created_at)
    assert event.id.startswith("evt_")
    assert event.object == "event"
    assert request.headers["webhook-id"].startswith("wh_")
    assert request.headers["content-type"] == "application/json"
    assert the_delivery(context).outcome == "delivered"


def _cancel(client: openai.OpenAI, context: WorkerContext, job_id: str) -> None:
    client.fine_tuning.jobs.cancel(job_id)


def _fail(_client: openai.OpenAI, context: WorkerContext, job_id: str) -> None:
    lease = _take(context, job_id)
    with context.database.transaction() as session:
        leases.fail(session, lease, InvalidTrainingFileError("line 3"))


def _crash(_client: openai.OpenAI, context: WorkerContext, job_id: str) -> None:
    lease = _take(context, job_id)
    with context.database.transaction() as session:
        leases.retry_or_fail(session, lease, WorkerCrashedError("gone"), max_attempts=1)


def _vanish(_client: openai.OpenAI, context: WorkerContext, job_id: str) -> None:
    _take(context, job_id, seconds=-1)
    with context.database.transaction() as session:
        session.get_one(Job, job_id).num_losses = 9
    context.watch = Watch(0)
    sweep(context)


def test_every_other_way_a_job_ends_is_reported_once(
    client: openai.OpenAI, context: WorkerContext, receiver: Receiver, endpoint: Any
) -> None:
    for end, status in ((_cancel, "cancelled"), (_fail, "failed"), (_crash, "failed"), (_vanish, "failed")):
        receiver.received.clear()
        job_id = create_job(client)
        end(client, context, job_id)
        assert client.fine_tuning.jobs.retrieve(job_id).status == status
        assert deliver_due(context) == 1, end
        (request,) = receiver.received
        event = client.webhooks.unwrap(request.body, request.headers, secret=endpoint.signing_secret)
        assert (event.type, event.data.id) == (f"fine_tuning.job.{status}", job_id)


def test_a_workers_thread_sends_by_itself_and_outlives_a_fault(
    client: openai.OpenAI,
    context: WorkerContext,
    receiver: Receiver,
    endpoint: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    faults: list[Exception] = [UnavailableError("away"), RuntimeError("a bug")]

    def deliver(context: WorkerContext) -> int:
        if faults:
            raise faults.pop(0)
        return deliver_due(context)

    monkeypatch.setattr(webhook_dispatcher, "deliver_due", deliver)
    context.settings = context.settings.model_copy(update={"sweep_seconds": 0.05})
    thread = threading.Thread(target=webhook_dispatcher.deliver_for_ever, args=(context,), daemon=True)
    thread.start()
    client.fine_tuning.jobs.cancel(create_job(client))
    wait_until(lambda: receiver.received, what="the webhook has come")
    context.stopping.set()
    thread.join(timeout=30)
    assert not thread.is_alive()
    assert len(receiver.received) == 1


def test_an_event_goes_to_the_endpoints_of_its_type_under_one_id(
    client: openai.OpenAI, context: WorkerContext, receiver: Receiver, endpoint: Any
) -> None:
    client.webhooks.create(name="two", url=f"{receiver.url}/two", event_types=["fine_tuning.job.cancelled"])
    client.webhooks.create(name="no", url=f"{receiver.url}/no", event_types=["fine_tuning.job.succeeded"])
    client.fine_tuning.jobs.cancel(create_job(client))
    assert deliver_due(context) == 2
    assert {request.path for request in receiver.received} == {"/hook", "/hook/two"}
    assert len({request.body for request in receiver.received}) == 1
    assert len({request.headers["webhook-id"] for request in receiver.received}) == 2


def test_what_fails_is_sent_again_the_same_until_a_2xx(
    client: openai.OpenAI, context: WorkerContext, receiver: Receiver, endpoint: Any
) -> None:
    receiver.statuses = [500, 302, 204]
    client.fine_tuning.jobs.cancel(create_job(client))
    for tried in (1, 2):
        assert deliver_due(context) == 1
        assert deliver_due(context) == 0, "it is not due yet"
        row = the_delivery(context)
        assert (row.num_tries, row.finished_at) == (tried, None)
        wind(context, "next_try_at = now()")
    assert deliver_due(context) == 1
    assert the_delivery(context).outcome == "delivered"
    # A redirect was not followed.
    assert [request.path for request in receiver.received] == ["/hook"] * 3
    assert len({request.body for request in receiver.received}) == 1
    assert len({request.headers["webhook-id"] for request in receiver.received}) == 1
    for request in receiver.received:
        client.webhooks.unwrap(request.body, request.headers, secret=endpoint.signing_secret)
    wind(context, "next_try_at = now()")
    assert deliver_due(context) == 0


def test_after_three_days_it_is_given_up(
    client: openai.OpenAI, context: WorkerContext, receiver: Receiver, endpoint: Any
) -> None:
    receiver.statuses = [410]
    client.fine_tuning.jobs.cancel(create_job(client))
    wind(context, "created_at = now() - interval '73 hours'")
    assert deliver_due(context) == 1
    row = the_delivery(context)
    assert (row.outcome, row.last_status_code) == ("given_up", 410)
    wind(context, "next_try_at = now()")
    assert deliver_due(context) == 0


def test_a_deleted_endpoint_gets_nothing_more_and_a_moved_one_gets_what_waits(
    client: openai.OpenAI, context: WorkerContext, receiver: Receiver, endpoint: Any
) -> None:
    receiver.statuses = [500]
    client.fine_tuning.jobs.cancel(create_job(client))
    assert deliver_due(context) == 1
    client.webhooks.update(endpoint.id, url=f"{receiver.url}/moved")
    wind(context, "next_try_at = now()")
    assert deliver_due(context) == 1
    assert receiver.received[-1].path == "/hook/moved"
    client.webhooks.delete(endpoint.id)
    wind(context, "next_try_at = now()")
    assert deliver_due(context) == 0
    client.fine_tuning.jobs.cancel(create_job(client))
    assert deliver_due(context) == 0
    assert the_delivery(context).outcome == "endpoint_deleted"


def test_two_secrets_sign_while_the_old_one_lives(
    client: openai.OpenAI, context: WorkerContext, receiver: Receiver, endpoint: Any
) -> None:
    rotated = client.webhooks.rotate_secret(endpoint.id, keep_old_secret_active_for_24_hours=True)
    client.fine_tuning.jobs.cancel(create_job(client))
    deliver_due(context)
    (request,) = receiver.received
    for secret in (rotated.signing_secret, endpoint.signing_secret):
        client.webhooks.unwrap(request.body, request.headers, secret=secret)
    with context.database.engine.begin() as connection:
        connection.execute(text("UPDATE webhook_endpoints SET old_secret_expires_at = now()"))
    client.fine_tuning.jobs.cancel(create_job(client))
    deliver_due(context)
    late = receiver.received[-1]
    client.webhooks.unwrap(late.body, late.headers, secret=rotated.signing_secret)
    with pytest.raises(openai.InvalidWebhookSignatureError):
        client.webhooks.unwrap(late.body, late.headers, secret=endpoint.signing_secret)


def test_no_two_workers_send_the_same_and_a_late_one_writes_nothing(
    client: openai.OpenAI, context: WorkerContext, receiver: Receiver, endpoint: Any
) -> None:
    client.fine_tuning.jobs.cancel(create_job(client))
    with context.database.transaction() as one, context.database.transaction() as two:
        (first,) = deliveries.claim_due(one, context.sealer, limit=9, timeout_seconds=1)
        assert deliveries.claim_due(two, context.sealer, limit=9, timeout_seconds=1) == []
    with context.database.transaction() as session:
        assert deliveries.claim_due(session, context.sealer, limit=9, timeout_seconds=1) == [], (
            "the lease holds"
        )
    # The first worker does not report in time.
    wind(context, "next_try_at = now()")
    with context.database.transaction() as session:
        (second,) = deliveries.claim_due(session, context.sealer, limit=9, timeout_seconds=1)
    assert second.message == first.message
    with context.database.transaction() as session:
        deliveries.record(session, first, Outcome(status_code=204), chance=0.5)
    assert the_delivery(context).finished_at is None
    with context.database.transaction() as session:
        deliveries.record(session, second, Outcome(status_code=204), chance=0.5)
    assert the_delivery(context).outcome == "delivered"


def test_a_project_with_many_deliveries_holds_up_no_other(
    api: Api, client: openai.OpenAI, context: WorkerContext, receiver: Receiver, endpoint: Any
) -> None:
    headers, body = api.headers, {"name": "other", "project": "other"}
    key = httpx2.post(f"{api.base_url}/v1/keys", headers=headers, json=body).json()["key"]
    other = openai.OpenAI(base_url=f"{api.base_url}/v1", api_key=key, max_retries=0)
    other.webhooks.create(name="o", url=f"{receiver.url}/o", event_types=["fine_tuning.job.cancelled"])
    client.fine_tuning.jobs.cancel(create_job(client))
    with context.database.engine.begin() as connection:
        columns = "organization_id, project_id, endpoint_id, job_id, event_id, event_type, next_try_at"
        connection.execute(
            text(
                f"INSERT INTO webhook_deliveries (id, {columns}) SELECT 'wh_' || n, {columns} "
                "FROM webhook_deliveries, generate_series(1, 40) n"
            )
        )
    other.fine_tuning.jobs.cancel(create_job(other))
    assert deliver_due(context) == deliveries.MAX_OF_A_PROJECT + 1
    assert [request.path for request in receiver.received].count("/hook/o") == 1
    assert deliver_due(context) == deliveries.MAX_OF_A_PROJECT


def test_an_end_that_is_rolled_back_is_never_reported(
    client: openai.OpenAI, context: WorkerContext, endpoint: Any
) -> None:
    lease = _take(context, create_job(client))
    with pytest.raises(RuntimeError), context.database.transaction() as session:
        leases.fail(session, lease, InvalidTrainingFileError("line 3"))
        raise RuntimeError("the end did not come about")
    assert deliver_due(context) == 0


def test_a_receiver_that_became_internal_is_not_called(
    client: openai.OpenAI, context: WorkerContext, receiver: Receiver, endpoint: Any
) -> None:
    client.fine_tuning.jobs.cancel(create_job(client))
    context.settings = context.settings.model_copy(update={"webhook_allowed_targets": ""})
    assert deliver_due(context) == 1
    assert receiver.received == []
    assert "no permitted address" in str(the_delivery(context).last_error)


def test_what_no_endpoint_waits_for_takes_no_turn_of_what_one_does(
    client: openai.OpenAI, context: WorkerContext, receiver: Receiver, endpoint: Any
) -> None:
    for _ in range(deliveries.MAX_OF_A_PROJECT):
        client.fine_tuning.jobs.cancel(create_job(client))
    with context.database.engine.begin() as connection:
        connection.execute(text("UPDATE webhook_endpoints SET deleted_at = now()"))
    client.webhooks.create(name="two", url=f"{receiver.url}/two", event_types=["fine_tuning.job.cancelled"])
    client.fine_tuning.jobs.cancel(create_job(client))
    assert deliver_due(context) == 1
    assert [request.path for request in receiver.received] == ["/hook/two"]


def test_an_endpoint_is_not_deleted_between_an_end_and_its_delivery(
    client: openai.OpenAI, context: WorkerContext, endpoint: Any
) -> None:
    job_id = create_job(client)
    with context.database.transaction() as session:
        owner = session.execute(text("SELECT organization_id, project_id FROM jobs")).one()
    scope = Principal(owner[0], "personal", owner[1], None)
    with context.database.transaction() as ending:
        deliveries.enqueue(ending, job_id, JobStatus.CANCELLED)
        with pytest.raises(UnavailableError), context.database.transaction() as deleting:
            deleting.execute(text("SET LOCAL lock_timeout = '50ms'"))
            endpoints.delete(deleting, scope, endpoint.id)
    client.webhooks.delete(endpoint.id)
    assert the_delivery(context).outcome == "endpoint_deleted"


def test_what_is_known_is_written_while_another_receivers_name_server_hangs(
    client: openai.OpenAI,
    context: WorkerContext,
    receiver: Receiver,
    endpoint: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked, may_answer = threading.Event(), threading.Event()
    real = socket.getaddrinfo

    def getaddrinfo(host: Any, *args: Any, **kwargs: Any) -> Any:
        if host != "hangs.example":
            return real(host, *args, **kwargs)
        asked.set()
        may_answer.wait(60)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    client.webhooks.create(
        name="hangs", url="https://hangs.example/", event_types=["fine_tuning.job.cancelled"]
    )
    client.fine_tuning.jobs.cancel(create_job(client))
    context.settings = context.settings.model_copy(update={"webhook_timeout_seconds": 60})

    def outcomes() -> list[Any]:
        with context.database.transaction() as session:
            rows = session.query(WebhookDelivery).order_by(WebhookDelivery.outcome.nulls_last())
            return [(row.outcome, row.last_error) for row in rows]

    thread = threading.Thread(target=deliver_due, args=(context,), daemon=True)
    thread.start()
    try:
        assert asked.wait(30)
        wait_until(lambda: outcomes() == [("delivered", None), (None, None)], seconds=20)
    finally:
        may_answer.set()
        thread.join(timeout=30)
    assert outcomes() == [
        ("delivered", None),
        (None, "its name leads to no permitted address"),
    ]
