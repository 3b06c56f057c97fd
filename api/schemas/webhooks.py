"""Webhook endpoints and their tests."""

from typing import Annotated, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from api.schemas.base import Body
from db.tables import WebhookEndpoint
from luthier.webhooks.signing import shown_hint

Name = Annotated[str, Field(min_length=1, max_length=256)]
EventTypes = Annotated[list[str], Field(min_length=1, max_length=64)]


class CreateEndpointBody(Body):
    """Body of POST /v1/webhook_endpoints."""

    name: Name
    url: str
    event_types: EventTypes


class ChangeEndpointBody(Body):
    """Body of POST /v1/webhook_endpoints/{id}; what is absent or null stays as it is."""

    name: Name | None = None
    url: str | None = None
    event_types: EventTypes | None = None


class RotateSecretBody(Body):
    """Body of POST /v1/webhook_endpoints/{id}/rotate_secret, which may be left out."""

    keep_old_secret_active_for_24_hours: bool | None = None


class TestEndpointBody(Body):
    """Body of POST /v1/webhook_endpoints/{id}/test."""

    event_type: str


class EndpointObject(TypedDict):
    """A receiver of webhooks; `signing_secret` is only in the answers that made a secret."""

    id: str
    object: Literal["webhook_endpoint"]
    name: str
    url: str
    event_types: list[str]
    created_at: int
    updated_at: int
    signing_secret_hint: str | None
    signing_secret: NotRequired[str]


class EndpointTestObject(TypedDict):
    """A receiver's answer to a test."""

    object: Literal["webhook_endpoint.test"]
    webhook_endpoint_id: str
    event_type: str
    status_code: int
    success: bool


class EventTypesPage(TypedDict):
    """The types of events that this service sends."""

    object: Literal["list"]
    data: list[str]


def endpoint_object(endpoint: WebhookEndpoint, secret: str | None = None) -> EndpointObject:
    """Return an endpoint as clients see it, with its secret in the answers that made one."""
    body: EndpointObject = {
        "id": endpoint.id,
        "object": "webhook_endpoint",
        "name": endpoint.name,
        "url": endpoint.url,
        "event_types": endpoint.event_types,
        "created_at": int(endpoint.created_at.timestamp()),
        "updated_at": int(endpoint.updated_at.timestamp()),
        "signing_secret_hint": shown_hint(endpoint.secret_hint),
    }
    if secret is not None:
        body["signing_secret"] = secret
    return body
