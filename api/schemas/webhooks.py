"""What clients say of webhook endpoints and hear of them."""

from typing import Annotated, Literal, NotRequired

from pydantic import BaseModel, ConfigDict, Field
from typing_extensions import TypedDict

from db.tables import WebhookEndpoint
from luthier.webhooks.signing import shown_hint

Name = Annotated[str, Field(min_length=1, max_length=256)]
EventTypes = Annotated[list[str], Field(min_length=1, max_length=64)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class CreateEndpointBody(_Body):
    """Body of POST /v1/webhook_endpoints."""

    name: Name
    url: str
    event_types: EventTypes


class ChangeEndpointBody(_Body):
    """Body of POST /v1/webhook_endpoints/{id}; what is absent or null stays as it is."""

    name: Name | None = None
    url: str | None = None
    event_types: EventTypes | None = None


class RotateSecretBody(_Body):
    """Body of POST /v1/webhook_endpoints/{id}/rotate_secret, which may be left out."""

    keep_old_secret_active_for_24_hours: bool | None = None


class TestEndpointBody(_Body):
    """Body of POST /v1/webhook_endpoints/{id}/test."""

    event_type: str


class EndpointObject(TypedDict):
    """A receiver of webhooks; `signing_secret` is in the answers that made one alone."""

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
    """What a receiver answered to a test."""

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
    """Return an endpoint as clients see it; the secret is in the answers that made it and nowhere else."""
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
