"""Webhook endpoints and their tests."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field
from typing_extensions import TypedDict

from api.schemas.base import Absent, Answer, Body, Timestamp, absent_if_none
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


class EndpointObject(Answer):
    """A receiver of webhooks; `signing_secret` is only in the answers that made a secret."""

    id: str
    object: Literal["webhook_endpoint"] = "webhook_endpoint"
    name: str
    url: str
    event_types: list[str]
    created_at: Timestamp
    updated_at: Timestamp
    signing_secret_hint: Annotated[str | None, BeforeValidator(shown_hint)] = Field(
        validation_alias="secret_hint"
    )
    signing_secret: str | Absent = absent_if_none()


class EndpointTestObject(Answer):
    """A receiver's answer to a test; `success` is what the SDK's type allows."""

    object: Literal["webhook_endpoint.test"] = "webhook_endpoint.test"
    webhook_endpoint_id: str
    event_type: str
    status_code: int
    success: bool = True


class EventTypesPage(TypedDict):
    """The types of events that this service sends."""

    object: Literal["list"]
    data: list[str]
