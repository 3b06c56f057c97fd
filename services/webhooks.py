"""Webhook endpoints: a project's receivers of events. What is sent to them is in services/deliveries.py."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from db.queries import find_cursor, find_owned, lock_key, page
from db.webhook_tables import WebhookDelivery, WebhookEndpoint
from luthier.core.errors import InvalidRequestError, InvalidValueError, NotFoundError
from luthier.core.ids import new_id
from luthier.webhooks.events import EVENT_TYPES
from luthier.webhooks.signing import new_secret
from luthier.webhooks.targets import TargetRules, check_url
from services.scope import Scope

# An end of a job writes a delivery for each: a bound on what one request may set off.
MAX_ENDPOINTS = 50
_OLD_SECRET_LIFE = timedelta(hours=24)


@dataclass(frozen=True)
class EndpointChange:
    """What a client says of an endpoint; None leaves a member as it is."""

    name: str | None = None
    url: str | None = None
    event_types: Sequence[str] | None = None


def _check_event_types(event_types: Sequence[str]) -> list[str]:
    for index, event_type in enumerate(event_types):
        check_event_type(event_type, param=f"event_types.{index}")
    return list(dict.fromkeys(event_types))


def check_event_type(event_type: str, *, param: str) -> None:
    """Refuse a type of event that this service never sends.

    Args:
        event_type: the type.
        param: the field that names it.

    Raises:
        InvalidValueError: when it is none of EVENT_TYPES; the message lists them.
    """
    if event_type not in EVENT_TYPES:
        raise InvalidValueError(f"{param}: this service sends {', '.join(EVENT_TYPES)}.", param=param)


def create(
    session: Session,
    scope: Scope,
    rules: TargetRules,
    *,
    name: str,
    url: str,
    event_types: Sequence[str],
) -> WebhookEndpoint:
    """Register a receiver.

    Args:
        session: the session.
        scope: the caller.
        rules: which URLs the operator allows.
        name: what people call it.
        url: where events are sent.
        event_types: which of them.

    Returns:
        The row, with its secret.

    Raises:
        InvalidRequestError: when the URL or a type is refused, or the project has as many as it may.
    """
    check_url(url, rules)
    types = _check_event_types(event_types)
    lock_key(session, f"{scope.project_id} webhook endpoints")
    num_endpoints = session.scalar(
        select(func.count())
        .select_from(WebhookEndpoint)
        .where(WebhookEndpoint.project_id == scope.project_id, WebhookEndpoint.deleted_at.is_(None))
    )
    if (num_endpoints or 0) >= MAX_ENDPOINTS:
        raise InvalidRequestError(
            f"The project has {MAX_ENDPOINTS} webhook endpoints, and no more are allowed; delete one."
        )
    endpoint = WebhookEndpoint(
        id=new_id("webhook_endpoint"),
        **scope.columns(),
        name=name,
        url=url,
        event_types=types,
        secret=new_secret(),
    )
    session.add(endpoint)
    session.flush()
    session.refresh(endpoint)
    return endpoint


def get(session: Session, scope: Scope, endpoint_id: str, *, for_update: bool = False) -> WebhookEndpoint:
    """Return an endpoint of the project.

    Args:
        session: the session.
        scope: the caller.
        endpoint_id: its id.
        for_update: lock it until the transaction ends.

    Returns:
        The row.

    Raises:
        NotFoundError: when there is none of that id.
    """
    endpoint = find_owned(session, WebhookEndpoint, scope.project_id, endpoint_id, for_update=for_update)
    if endpoint is None:
        raise NotFoundError(f"No such webhook endpoint: {endpoint_id[:64]}", param="webhook_endpoint_id")
    return endpoint


def list_(
    session: Session, scope: Scope, *, after: str | None, limit: int
) -> tuple[Sequence[WebhookEndpoint], bool]:
    """Return a page of the project's endpoints, newest first, and whether more follow.

    Args:
        session: the session.
        scope: the caller.
        after: id of the endpoint that ended the page before.
        limit: endpoints of the page.

    Returns:
        The rows, and whether more follow.

    Raises:
        InvalidValueError: when `after` is no endpoint of the project.
    """
    cursor = find_cursor(session, WebhookEndpoint, after, WebhookEndpoint.project_id == scope.project_id)
    statement = select(WebhookEndpoint).where(
        WebhookEndpoint.project_id == scope.project_id, WebhookEndpoint.deleted_at.is_(None)
    )
    return page(session, statement, WebhookEndpoint, after=cursor, limit=limit)


def change(
    session: Session, scope: Scope, rules: TargetRules, endpoint_id: str, wanted: EndpointChange
) -> WebhookEndpoint:
    """Change an endpoint; what still waits to be sent goes to its new URL.

    Args:
        session: the session.
        scope: the caller.
        rules: which URLs the operator allows.
        endpoint_id: its id.
        wanted: what is to be changed.

    Returns:
        The row.

    Raises:
        NotFoundError: when the project has no such endpoint.
        InvalidValueError: when the URL or a type is refused.
    """
    endpoint = get(session, scope, endpoint_id, for_update=True)
    values: dict[str, object] = {}
    if wanted.name is not None:
        values["name"] = wanted.name
    if wanted.url is not None:
        check_url(wanted.url, rules)
        values["url"] = wanted.url
    if wanted.event_types is not None:
        values["event_types"] = _check_event_types(wanted.event_types)
    # A change that changes nothing is none: `updated_at` stays.
    if any(getattr(endpoint, name) != value for name, value in values.items()):
        for name, value in values.items():
            setattr(endpoint, name, value)
        endpoint.updated_at = func.now()
        session.flush()
        session.refresh(endpoint)
    return endpoint


def rotate_secret(session: Session, scope: Scope, endpoint_id: str, *, keeps_old: bool) -> WebhookEndpoint:
    """Give an endpoint a new signing secret.

    Args:
        session: the session.
        scope: the caller.
        endpoint_id: its id.
        keeps_old: whether the one before signs as well for 24 hours more.

    Returns:
        The row, with its new secret.

    Raises:
        NotFoundError: when the project has no such endpoint.
    """
    endpoint = get(session, scope, endpoint_id, for_update=True)
    endpoint.old_secret = endpoint.secret if keeps_old else None
    endpoint.old_secret_expires_at = func.now() + _OLD_SECRET_LIFE if keeps_old else None
    endpoint.secret = new_secret()
    endpoint.updated_at = func.now()
    session.flush()
    session.refresh(endpoint)
    return endpoint


def delete(session: Session, scope: Scope, endpoint_id: str) -> None:
    """Forget an endpoint and its secrets; what waited to be sent to it never is.

    Args:
        session: the session.
        scope: the caller.
        endpoint_id: its id.

    Raises:
        NotFoundError: when the project has no such endpoint.
    """
    endpoint = get(session, scope, endpoint_id, for_update=True)
    endpoint.deleted_at = func.now()
    endpoint.secret, endpoint.old_secret = "", None
    session.execute(
        update(WebhookDelivery)
        .where(WebhookDelivery.endpoint_id == endpoint.id, WebhookDelivery.finished_at.is_(None))
        .values(finished_at=func.now(), outcome="endpoint_deleted")
        .execution_options(synchronize_session=False)
    )
    session.flush()


def active_secrets(endpoint: WebhookEndpoint, now: datetime) -> tuple[str, ...]:
    """Return the secrets that sign at a moment, the newest first."""
    expires_at = endpoint.old_secret_expires_at
    if endpoint.old_secret is None or expires_at is None or expires_at <= now:
        return (endpoint.secret,)
    return (endpoint.secret, endpoint.old_secret)
