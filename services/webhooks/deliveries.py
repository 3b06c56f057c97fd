"""Webhook deliveries: the ends of jobs, sent at least once and in no order.

They are written with the end itself and sent by any worker. No session is open during a request.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import and_, func, select
from sqlalchemy.orm import Session

from db.queries import delete_some
from db.tables import Job, WebhookDelivery, WebhookEndpoint
from luthier.core.errors import InvalidValueError, SecretKeyError
from luthier.core.ids import new_id
from luthier.core.states import JobStatus
from luthier.webhooks.events import Message, Outcome, event_type_of, payload
from luthier.webhooks.schedule import next_try
from luthier.webhooks.sealing import Sealer
from services.webhooks.endpoints import active_secrets

# Beside the receiver's own time: to claim, and to write down what came of it.
_LEASE_MARGIN_SECONDS = 30.0
MAX_OF_A_PROJECT = 5


@dataclass(frozen=True)
class ClaimedDelivery:
    """A try at a delivery, and what is to be sent; `num_tries` is its fence."""

    delivery_id: str
    num_tries: int
    message: Message
    # Why it can't be signed and is not to be sent; it is a try all the same.
    error: str | None = None


def enqueue(session: Session, job_id: str, status: JobStatus) -> None:
    """Queue the deliveries of a job's end, in the transaction in which it ends."""
    event_type = event_type_of(status)
    endpoints = session.execute(
        select(WebhookEndpoint.id, WebhookEndpoint.organization_id, WebhookEndpoint.project_id)
        .join(Job, Job.project_id == WebhookEndpoint.project_id)
        .where(
            Job.id == job_id,
            WebhookEndpoint.deleted_at.is_(None),
            WebhookEndpoint.event_types.contains([event_type]),
        )
        # One that is deleted meanwhile is deleted before, or after it can close what is written here.
        .with_for_update(read=True, of=WebhookEndpoint)
    ).all()
    # One event id for all endpoints, so that a client with two of them recognises it.
    event_id = new_id("webhook_event")
    session.add_all(
        WebhookDelivery(
            id=new_id("webhook_delivery"),
            organization_id=endpoint.organization_id,
            project_id=endpoint.project_id,
            endpoint_id=endpoint.id,
            job_id=job_id,
            event_id=event_id,
            event_type=event_type,
        )
        for endpoint in endpoints
    )


def claim_due(
    session: Session, sealer: Sealer, *, limit: int, timeout_seconds: float
) -> list[ClaimedDelivery]:
    """Claim due deliveries, longest waiting first and few of any one project, so that a hanging receiver does
    not delay other projects; they are due again when their try is not recorded in time.
    """
    is_due = and_(WebhookDelivery.finished_at.is_(None), WebhookDelivery.next_try_at <= func.now())
    turn = func.row_number().over(
        partition_by=WebhookDelivery.project_id, order_by=WebhookDelivery.next_try_at
    )
    turns = (
        select(WebhookDelivery.id, turn.label("turn"))
        .join(WebhookEndpoint, WebhookEndpoint.id == WebhookDelivery.endpoint_id)
        # What is never claimed must take no turn of what is.
        .where(is_due, WebhookEndpoint.deleted_at.is_(None))
        .subquery()
    )
    rows = session.execute(
        select(WebhookDelivery, WebhookEndpoint, func.now())
        .join(WebhookEndpoint, WebhookEndpoint.id == WebhookDelivery.endpoint_id)
        .join(turns, turns.c.id == WebhookDelivery.id)
        # Once more: a row that another worker has just taken is looked at again by this condition alone.
        .where(is_due, WebhookEndpoint.deleted_at.is_(None), turns.c.turn <= MAX_OF_A_PROJECT)
        .order_by(turns.c.turn, WebhookDelivery.next_try_at)
        .limit(limit)
        .with_for_update(skip_locked=True, of=WebhookDelivery)
    ).all()
    claimed = []
    for delivery, endpoint, now in rows:
        delivery.num_tries += 1
        delivery.next_try_at = now + timedelta(seconds=timeout_seconds + _LEASE_MARGIN_SECONDS)
        body = payload(
            delivery.event_id,
            delivery.event_type,
            created_at=int(delivery.created_at.timestamp()),
            job_id=delivery.job_id,
        )
        secrets, error = _find_secrets(endpoint, sealer, now)
        message = Message(delivery.id, endpoint.url, body, secrets)
        claimed.append(ClaimedDelivery(delivery.id, delivery.num_tries, message, error))
    return claimed


def _find_secrets(
    endpoint: WebhookEndpoint, sealer: Sealer, now: datetime
) -> tuple[tuple[str, ...], str | None]:
    """Return the secrets that sign, or none and why; one that can't be opened must not stop the others."""
    try:
        return active_secrets(endpoint, sealer, now), None
    except (InvalidValueError, SecretKeyError) as error:
        return (), error.message


def prune(session: Session, *, kept_seconds: float, limit: int) -> int:
    """Forget deliveries that finished long ago, at most `limit`; return how many."""
    finished = WebhookDelivery.finished_at < func.now() - timedelta(seconds=kept_seconds)
    return delete_some(session, WebhookDelivery, finished, limit=limit)


def record(session: Session, claimed: ClaimedDelivery, outcome: Outcome, *, chance: float) -> None:
    """Record the outcome of a try: delivered, to be tried again, or given up after 72 hours.

    A try that was overtaken by another one writes nothing. `chance` is a random number from 0 to 1.
    """
    delivery = session.scalar(
        select(WebhookDelivery)
        .where(
            WebhookDelivery.id == claimed.delivery_id,
            WebhookDelivery.num_tries == claimed.num_tries,
            WebhookDelivery.finished_at.is_(None),
        )
        .with_for_update()
    )
    if delivery is None:
        return
    now = session.scalars(select(func.now())).one()
    again_at = next_try(claimed.num_tries, created_at=delivery.created_at, now=now, chance=chance)
    delivery.last_status_code, delivery.last_error = outcome.status_code, outcome.error
    if outcome.is_success:
        delivery.finished_at, delivery.outcome = now, "delivered"
    elif again_at is None:
        delivery.finished_at, delivery.outcome = now, "given_up"
    else:
        delivery.next_try_at = again_at
