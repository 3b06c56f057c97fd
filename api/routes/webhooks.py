"""Webhook endpoints: receivers of the ends of jobs, and a test of each."""

import time
from datetime import UTC, datetime
from typing import Annotated

from fastapi import APIRouter, Query
from sqlalchemy.orm import Session

from api.deps import AppState, AppStateDep, DetachedPrincipalDep, PrincipalDep, SessionDep, run_in_transaction
from api.schemas.base import DeletedObject, ListPage, list_object
from api.schemas.webhooks import (
    ChangeEndpointBody,
    CreateEndpointBody,
    EndpointObject,
    EndpointTestObject,
    EventTypesPage,
    RotateSecretBody,
    TestEndpointBody,
)
from luthier.core.errors import WebhookUnreachableError
from luthier.core.ids import new_id
from luthier.webhooks.events import EVENT_TYPES, Message, payload
from luthier.webhooks.sending import send
from luthier.webhooks.targets import TargetRules
from services.webhooks import endpoints

router = APIRouter(prefix="/v1", tags=["webhooks"])

Limit = Annotated[int, Query(ge=0, le=100)]
# The job of a test event; no job has this id.
_SAMPLE_JOB = "ftjob-test"


def _rules(state: AppState) -> TargetRules:
    settings = state.settings
    return TargetRules.parse(
        allow_http=settings.webhook_allow_http, allowed_targets=settings.webhook_allowed_targets
    )


@router.get("/webhook_event_types")
def list_event_types(_scope: PrincipalDep) -> EventTypesPage:
    """List the types of events that this service sends."""
    return {"object": "list", "data": list(EVENT_TYPES)}


@router.post("/webhook_endpoints")
def create_endpoint(
    body: CreateEndpointBody, session: SessionDep, principal: PrincipalDep, state: AppStateDep
) -> EndpointObject:
    """Register a receiver; its signing secret is in this answer and nowhere else."""
    endpoint, secret = endpoints.create(session, principal, _rules(state), state.sealer, **body.model_dump())
    return EndpointObject.of(endpoint, signing_secret=secret)


@router.get("/webhook_endpoints")
def list_endpoints(
    session: SessionDep, principal: PrincipalDep, after: str | None = None, limit: Limit = 20
) -> ListPage[EndpointObject]:
    """List the project's endpoints, newest first."""
    rows, has_more = endpoints.list_(session, principal, after=after, limit=limit)
    return list_object([EndpointObject.of(row) for row in rows], has_more=has_more, with_ids=True)


@router.get("/webhook_endpoints/{webhook_endpoint_id}")
def retrieve_endpoint(
    webhook_endpoint_id: str, session: SessionDep, principal: PrincipalDep
) -> EndpointObject:
    """Describe one endpoint."""
    return EndpointObject.of(endpoints.get(session, principal, webhook_endpoint_id))


@router.post("/webhook_endpoints/{webhook_endpoint_id}")
def change_endpoint(
    webhook_endpoint_id: str,
    body: ChangeEndpointBody,
    session: SessionDep,
    principal: PrincipalDep,
    state: AppStateDep,
) -> EndpointObject:
    """Change an endpoint's name, URL or types."""
    values = body.model_dump(exclude_none=True)
    return EndpointObject.of(endpoints.change(session, principal, _rules(state), webhook_endpoint_id, values))


@router.delete("/webhook_endpoints/{webhook_endpoint_id}")
def delete_endpoint(webhook_endpoint_id: str, session: SessionDep, principal: PrincipalDep) -> DeletedObject:
    """Delete an endpoint; nothing more is sent to it."""
    endpoints.delete(session, principal, webhook_endpoint_id)
    return {"id": webhook_endpoint_id, "object": "webhook_endpoint.deleted", "deleted": True}


@router.post("/webhook_endpoints/{webhook_endpoint_id}/rotate_secret")
def rotate_endpoint_secret(
    webhook_endpoint_id: str,
    session: SessionDep,
    principal: PrincipalDep,
    state: AppStateDep,
    body: RotateSecretBody | None = None,
) -> EndpointObject:
    """Give an endpoint a new signing secret, which is in this answer and nowhere else."""
    keeps_old = body is not None and bool(body.keep_old_secret_active_for_24_hours)
    endpoint, secret = endpoints.rotate_secret(
        session, principal, state.sealer, webhook_endpoint_id, keeps_old=keeps_old
    )
    return EndpointObject.of(endpoint, signing_secret=secret)


@router.post("/webhook_endpoints/{webhook_endpoint_id}/test")
async def test_endpoint(
    webhook_endpoint_id: str, body: TestEndpointBody, state: AppStateDep, principal: DetachedPrincipalDep
) -> EndpointTestObject:
    """Send a sample event at once, a single time, and say what the receiver answered."""

    def sample(session: Session) -> Message:
        endpoint = endpoints.get(session, principal, webhook_endpoint_id)
        endpoints.check_event_type(body.event_type, param="event_type")
        event = payload(
            new_id("webhook_event"), body.event_type, created_at=int(time.time()), job_id=_SAMPLE_JOB
        )
        secrets = endpoints.active_secrets(endpoint, state.sealer, datetime.now(UTC))
        return Message(new_id("webhook_delivery"), endpoint.url, event, secrets)

    message = await run_in_transaction(state, sample)
    timeout_seconds = state.settings.webhook_timeout_seconds
    with state.webhook_tests.hold(principal.project_id):
        outcome = await send(message, _rules(state), timeout_seconds=timeout_seconds)
    if outcome.status_code is None:
        raise WebhookUnreachableError(f"The endpoint gave no answer: {outcome.error}.")
    return EndpointTestObject(
        webhook_endpoint_id=webhook_endpoint_id, event_type=body.event_type, status_code=outcome.status_code
    )
