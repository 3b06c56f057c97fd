"""A job's end on its way to a receiver: real PostgreSQL, a real receiver, the real SDK that unwraps it."""

import socket
import threading
from pathlib import Path
from typing import Any

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
from tests.integration.hooks import Hooks
from tests.integration.training_script import run_script
from tests.training import Jobs
from worker import webhook_dispatcher
from worker.app import sweep
from worker.context import Watch, WorkerContext


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


def test_a_job_that_succeeds_is_reported_and_the_sdk_unwraps_it(hooks: Hooks, tmp_path: Path) -> None:
    job_id = hooks.jobs.prepared()
    assert hooks.deliver() == 0
    run_script(hooks.context, tmp_path, lambda script: script.start().epoch(1, 2.0).finish(1))

    assert hooks.deliver() == 1
    assert hooks.deliver() == 0
    (request,) = hooks.receiver.received
    event = hooks.unwrap(request)
    assert event.type == "fine_tuning.job.succeeded"
    assert event.data.id == job_id
    job = hooks.jobs.get(job_id)
    assert (job.status, job.finished_at) == ("succeeded", event.created_at)
    assert event.id.startswith("evt_")
    assert event.object == "event"
    assert request.headers["webhook-id"].startswith("wh_")
    assert request.headers["content-type"] == "application/json"
    assert hooks.delivery().outcome == "delivered"


def _fail(context: WorkerContext, job_id: str) -> None:
    lease = _take(context, job_id)
    with context.database.transaction() as session:
        leases.fail(session, lease, InvalidTrainingFileError("line 3"))


def _crash(context: WorkerContext, job_id: str) -> None:
    lease = _take(context, job_id)
    with context.database.transaction() as session:
        leases.retry_or_fail(session, lease, WorkerCrashedError("gone"), max_attempts=1)


def _vanish(context: WorkerContext, job_id: str) -> None:
    _take(context, job_id, seconds=-1)
    with context.database.transaction() as session:
        session.get_one(Job, job_id).num_losses = 9
    context.watch = Watch(0)
    sweep(context)


def test_every_other_way_a_job_ends_is_reported_once(hooks: Hooks) -> None:
    def cancel(_: WorkerContext, job_id: str) -> None:
        hooks.jobs.cancel(job_id)

    for end, status in ((cancel, "cancelled"), (_fail, "failed"), (_crash, "failed"), (_vanish, "failed")):
        hooks.receiver.received.clear()
        job_id = hooks.jobs.create()
        end(hooks.context, job_id)
        assert hooks.jobs.status(job_id) == status
        assert hooks.deliver() == 1, end
        (request,) = hooks.receiver.received
        event = hooks.unwrap(request)
        assert (event.type, event.data.id) == (f"fine_tuning.job.{status}", job_id)


def test_a_workers_thread_sends_and_outlives_a_fault(hooks: Hooks, monkeypatch: pytest.MonkeyPatch) -> None:
    faults: list[Exception] = [UnavailableError("away"), RuntimeError("a bug")]

    def deliver(_: WorkerContext) -> int:
        if faults:
            raise faults.pop(0)
        return hooks.deliver()

    monkeypatch.setattr(webhook_dispatcher, "deliver_due", deliver)
    hooks.context.settings = hooks.context.settings.model_copy(update={"sweep_seconds": 0.05})
    thread = threading.Thread(target=webhook_dispatcher.deliver_for_ever, args=(hooks.context,), daemon=True)
    thread.start()
    hooks.cancel_job()
    wait_until(lambda: hooks.receiver.received, what="the webhook has come")
    hooks.context.stopping.set()
    thread.join(timeout=30)
    assert not thread.is_alive()
    assert len(hooks.receiver.received) == 1


def test_an_event_goes_to_the_endpoints_of_its_type_under_one_id(hooks: Hooks) -> None:
    hooks.create("two")
    hooks.create("no", "fine_tuning.job.succeeded")
    hooks.cancel_job()
    assert hooks.deliver() == 2
    assert {request.path for request in hooks.receiver.received} == {"/hook", "/hook/two"}
    assert len({request.body for request in hooks.receiver.received}) == 1
    assert len({request.headers["webhook-id"] for request in hooks.receiver.received}) == 2


def test_what_fails_is_sent_again_the_same_until_a_2xx(hooks: Hooks) -> None:
    hooks.receiver.statuses = [500, 302, 204]
    hooks.cancel_job()
    for tried in (1, 2):
        assert hooks.deliver() == 1
        assert hooks.deliver() == 0, "it is not due yet"
        row = hooks.delivery()
        assert (row.num_tries, row.finished_at) == (tried, None)
        hooks.wind("next_try_at = now()")
    assert hooks.deliver() == 1
    assert hooks.delivery().outcome == "delivered"
    # A redirect was not followed.
    assert [request.path for request in hooks.receiver.received] == ["/hook"] * 3
    assert len({request.body for request in hooks.receiver.received}) == 1
    assert len({request.headers["webhook-id"] for request in hooks.receiver.received}) == 1
    for request in hooks.receiver.received:
        hooks.unwrap(request)
    hooks.wind("next_try_at = now()")
    assert hooks.deliver() == 0


def test_after_three_days_it_is_given_up(hooks: Hooks) -> None:
    hooks.receiver.statuses = [410]
    hooks.cancel_job()
    hooks.wind("created_at = now() - interval '73 hours'")
    assert hooks.deliver() == 1
    row = hooks.delivery()
    assert (row.outcome, row.last_status_code) == ("given_up", 410)
    hooks.wind("next_try_at = now()")
    assert hooks.deliver() == 0


def test_a_deleted_endpoint_gets_nothing_more_and_a_moved_one_gets_what_waits(hooks: Hooks) -> None:
    hooks.receiver.statuses = [500]
    hooks.cancel_job()
    assert hooks.deliver() == 1
    hooks.client.webhooks.update(hooks.endpoint.id, url=f"{hooks.receiver.url}/moved")
    hooks.wind("next_try_at = now()")
    assert hooks.deliver() == 1
    assert hooks.receiver.received[-1].path == "/hook/moved"
    hooks.client.webhooks.delete(hooks.endpoint.id)
    hooks.wind("next_try_at = now()")
    assert hooks.deliver() == 0
    hooks.cancel_job()
    assert hooks.deliver() == 0
    assert hooks.delivery().outcome == "endpoint_deleted"


def test_two_secrets_sign_while_the_old_one_lives(hooks: Hooks) -> None:
    rotated = hooks.client.webhooks.rotate_secret(hooks.endpoint.id, keep_old_secret_active_for_24_hours=True)
    hooks.cancel_job()
    hooks.deliver()
    (request,) = hooks.receiver.received
    for secret in (rotated.signing_secret, hooks.endpoint.signing_secret):
        hooks.unwrap(request, secret)
    hooks.execute("UPDATE webhook_endpoints SET old_secret_expires_at = now()")
    hooks.cancel_job()
    hooks.deliver()
    late = hooks.receiver.received[-1]
    hooks.unwrap(late, rotated.signing_secret)
    with pytest.raises(openai.InvalidWebhookSignatureError):
        hooks.unwrap(late)


def test_no_two_workers_send_the_same_and_a_late_one_writes_nothing(hooks: Hooks) -> None:
    hooks.cancel_job()
    with hooks.context.database.transaction() as one, hooks.context.database.transaction() as two:
        (first,) = deliveries.claim_due(one, hooks.context.sealer, limit=9, timeout_seconds=1)
        assert deliveries.claim_due(two, hooks.context.sealer, limit=9, timeout_seconds=1) == []
    with hooks.context.database.transaction() as session:
        assert deliveries.claim_due(session, hooks.context.sealer, limit=9, timeout_seconds=1) == [], (
            "the lease holds"
        )
    # The first worker does not report in time.
    hooks.wind("next_try_at = now()")
    with hooks.context.database.transaction() as session:
        (second,) = deliveries.claim_due(session, hooks.context.sealer, limit=9, timeout_seconds=1)
    assert second.message == first.message
    with hooks.context.database.transaction() as session:
        deliveries.record(session, first, Outcome(status_code=204), chance=0.5)
    assert hooks.delivery().finished_at is None
    with hooks.context.database.transaction() as session:
        deliveries.record(session, second, Outcome(status_code=204), chance=0.5)
    assert hooks.delivery().outcome == "delivered"


def test_a_project_with_many_deliveries_holds_up_no_other(hooks: Hooks, api: Api) -> None:
    hooks.cancel_job()
    columns = "organization_id, project_id, endpoint_id, job_id, event_id, event_type, next_try_at"
    hooks.execute(
        f"INSERT INTO webhook_deliveries (id, {columns}) SELECT 'wh_' || n, {columns} "
        "FROM webhook_deliveries, generate_series(1, 40) n"
    )
    other = Jobs(api.client(api.make_key()["key"]), hooks.context)
    other.client.webhooks.create(
        name="o", url=f"{hooks.receiver.url}/o", event_types=["fine_tuning.job.cancelled"]
    )
    other.cancel(other.create())
    assert hooks.deliver() == deliveries.MAX_OF_A_PROJECT + 1
    assert [request.path for request in hooks.receiver.received].count("/hook/o") == 1
    assert hooks.deliver() == deliveries.MAX_OF_A_PROJECT


def test_an_end_that_is_rolled_back_is_never_reported(hooks: Hooks) -> None:
    lease = _take(hooks.context, hooks.jobs.create())
    with pytest.raises(RuntimeError), hooks.context.database.transaction() as session:
        leases.fail(session, lease, InvalidTrainingFileError("line 3"))
        raise RuntimeError("the end did not come about")
    assert hooks.deliver() == 0


def test_a_receiver_that_became_internal_is_not_called(hooks: Hooks) -> None:
    hooks.cancel_job()
    hooks.context.settings = hooks.context.settings.model_copy(update={"webhook_allowed_targets": ""})
    assert hooks.deliver() == 1
    assert hooks.receiver.received == []
    assert "no permitted address" in str(hooks.delivery().last_error)


def test_what_no_endpoint_waits_for_takes_no_turn_of_what_one_does(hooks: Hooks) -> None:
    for _ in range(deliveries.MAX_OF_A_PROJECT):
        hooks.cancel_job()
    hooks.execute("UPDATE webhook_endpoints SET deleted_at = now()")
    hooks.create("two")
    hooks.cancel_job()
    assert hooks.deliver() == 1
    assert [request.path for request in hooks.receiver.received] == ["/hook/two"]


def test_an_endpoint_is_not_deleted_between_an_end_and_its_delivery(hooks: Hooks) -> None:
    job_id = hooks.jobs.create()
    with hooks.context.database.transaction() as session:
        owner = session.execute(text("SELECT organization_id, project_id FROM jobs")).one()
    scope = Principal(owner[0], "personal", owner[1], None)
    with hooks.context.database.transaction() as ending:
        deliveries.enqueue(ending, job_id, JobStatus.CANCELLED)
        with pytest.raises(UnavailableError), hooks.context.database.transaction() as deleting:
            deleting.execute(text("SET LOCAL lock_timeout = '50ms'"))
            endpoints.delete(deleting, scope, hooks.endpoint.id)
    hooks.client.webhooks.delete(hooks.endpoint.id)
    assert hooks.delivery().outcome == "endpoint_deleted"


def test_what_is_known_is_written_while_another_receivers_name_server_hangs(
    hooks: Hooks, monkeypatch: pytest.MonkeyPatch
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
    hooks.client.webhooks.create(
        name="hangs", url="https://hangs.example/", event_types=["fine_tuning.job.cancelled"]
    )
    hooks.cancel_job()
    hooks.context.settings = hooks.context.settings.model_copy(update={"webhook_timeout_seconds": 60})

    def outcomes() -> list[Any]:
        with hooks.context.database.transaction() as session:
            rows = session.query(WebhookDelivery).order_by(WebhookDelivery.outcome.nulls_last())
            return [(row.outcome, row.last_error) for row in rows]

    thread = threading.Thread(target=hooks.deliver, daemon=True)
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
