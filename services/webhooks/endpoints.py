"""Webhook endpoints: a project's receivers of events. Deliveries: deliveries.py."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

import structlog
from sqlalchemy import func, or_, select, update
from sqlalchemy.orm import Session

from db.queries import find_owned, lock_key, page
from db.tables import WebhookDelivery, WebhookEndpoint
from luthier.core.errors import InvalidRequestError, InvalidValueError, NotFoundError, SecretKeyError
from luthier.core.ids import new_id
from luthier.webhooks.events import EVENT_TYPES
from luthier.webhooks.sealing import Sealer
from luthier.webhooks.signing import is_secret, new_secret, secret_hint
from luthier.webhooks.targets import TargetRules, check_url
from services.accounts.auth import Principal

_log = structlog.get_logger()

# An end of a job writes a delivery for each: a bound on what one request may set off.
MAX_ENDPOINTS = 50
_OLD_SECRET_LIFE = timedelta(hours=24)


def _check_event_types(event_types: Sequence[str]) -> list[str]:
    for index, event_type in enumerate(event_types):
        check_event_type(event_type, param=f"event_types.{index}")
    return list(dict.fromkeys(event_types))


def check_event_type(event_type: str, *, param: str) -> None:
    """Refuse a type of event that this service never sends."""
    if event_type not in EVENT_TYPES:
        raise InvalidValueError(f"{param}: this service sends {', '.join(EVENT_TYPES)}.", param=param)


def create(
    session: Session,
    principal: Principal,
    rules: TargetRules,
    sealer: Sealer,
    *,
    name: str,
    url: str,
    event_types: Sequence[str],
) -> tuple[WebhookEndpoint, str]:
    """Register a receiver; return it with its secret, which is shown only now."""
    check_url(url, rules)
    types = _check_event_types(event_types)
    lock_key(session, f"{principal.project_id} webhook endpoints")
    num_endpoints = session.scalar(
        select(func.count())
        .select_from(WebhookEndpoint)
        .where(WebhookEndpoint.project_id == principal.project_id, WebhookEndpoint.deleted_at.is_(None))
    )
    if (num_endpoints or 0) >= MAX_ENDPOINTS:
        raise InvalidRequestError(
            f"The project has {MAX_ENDPOINTS} webhook endpoints, and no more are allowed; delete one."
        )
    secret = new_secret()
    endpoint = WebhookEndpoint(
        id=new_id("webhook_endpoint"),
        **principal.owner_columns(),
        name=name,
        url=url,
        event_types=types,
        secret=sealer.seal(secret),
        secret_hint=secret_hint(secret),
    )
    session.add(endpoint)
    session.flush()
    return endpoint, secret


def get(
    session: Session, principal: Principal, endpoint_id: str, *, for_update: bool = False
) -> WebhookEndpoint:
    endpoint = find_owned(session, WebhookEndpoint, principal.project_id, endpoint_id, for_update=for_update)
    if endpoint is None:
        raise NotFoundError(f"No such webhook endpoint: {endpoint_id[:64]}", param="webhook_endpoint_id")
    return endpoint


def list_(
    session: Session, principal: Principal, *, after: str | None, limit: int
) -> tuple[Sequence[WebhookEndpoint], bool]:
    """Return a page of the project's endpoints, newest first, and whether more follow."""
    is_listed = WebhookEndpoint.project_id == principal.project_id
    return page(session, WebhookEndpoint, is_listed, after=after, limit=limit)


def change(
    session: Session, principal: Principal, rules: TargetRules, endpoint_id: str, values: dict[str, Any]
) -> WebhookEndpoint:
    """Change `name`, `url` or `event_types` of an endpoint; pending deliveries go to its new URL."""
    endpoint = get(session, principal, endpoint_id, for_update=True)
    if "url" in values:
        check_url(values["url"], rules)
    if "event_types" in values:
        values["event_types"] = _check_event_types(values["event_types"])
    # A change that changes nothing is none: `updated_at` stays.
    if any(getattr(endpoint, name) != value for name, value in values.items()):
        for name, value in (values | {"updated_at": func.now()}).items():
            setattr(endpoint, name, value)
        session.flush()
    return endpoint


def rotate_secret(
    session: Session, principal: Principal, sealer: Sealer, endpoint_id: str, *, keeps_old: bool
) -> tuple[WebhookEndpoint, str]:
    """Give an endpoint a new signing secret, returned only now; the old one may sign for 24 hours more."""
    endpoint = get(session, principal, endpoint_id, for_update=True)
    old_secret = None
    if keeps_old and endpoint.secret != "":
        try:
            old_secret = reseal_secret(sealer, endpoint.secret)
        except SecretKeyError as error:
            # Rotating is the way out of a lost key; what can't be opened can't sign anyway.
            _log.warning("old webhook secret dropped", endpoint_id=endpoint.id, reason=error.message)
    endpoint.old_secret = old_secret
    endpoint.old_secret_expires_at = func.now() + _OLD_SECRET_LIFE if old_secret is not None else None
    secret = new_secret()
    endpoint.secret, endpoint.secret_hint = sealer.seal(secret), secret_hint(secret)
    endpoint.updated_at = func.now()
    session.flush()
    return endpoint, secret


def delete(session: Session, principal: Principal, endpoint_id: str) -> None:
    """Forget an endpoint and its secrets; what waited to be sent to it never is."""
    endpoint = get(session, principal, endpoint_id, for_update=True)
    endpoint.deleted_at = func.now()
    endpoint.secret, endpoint.secret_hint, endpoint.old_secret = "", "", None
    session.execute(
        update(WebhookDelivery)
        .where(WebhookDelivery.endpoint_id == endpoint.id, WebhookDelivery.finished_at.is_(None))
        .values(finished_at=func.now(), outcome="endpoint_deleted")
    )


def active_secrets(endpoint: WebhookEndpoint, sealer: Sealer, now: datetime) -> tuple[str, ...]:
    """Return the secrets that sign at a moment, the newest first; raises where the newest can't be opened."""
    if endpoint.secret == "":
        raise InvalidValueError(
            f"webhook_endpoint_id: {endpoint.id} has no signing secret any more; rotate it to get one.",
            param="webhook_endpoint_id",
        )
    newest = sealer.open(endpoint.secret)
    expires_at = endpoint.old_secret_expires_at
    if endpoint.old_secret is None or expires_at is None or expires_at <= now:
        return (newest,)
    try:
        return (newest, sealer.open(endpoint.old_secret))
    except SecretKeyError as error:
        # Receivers that know the newest secret are not affected.
        _log.warning("old webhook secret does not sign", endpoint_id=endpoint.id, reason=error.message)
        return (newest,)


def reseal(session: Session, sealer: Sealer) -> int:
    """Seal every signing secret with the first key, also those that an older version stored in plain text.

    Expired old secrets are erased. Raises SecretKeyError, and changes nothing, without a key or where a
    secret was sealed with another one.
    """
    endpoints = session.scalars(
        select(WebhookEndpoint)
        .where(or_(WebhookEndpoint.secret != "", WebhookEndpoint.old_secret.is_not(None)))
        .order_by(WebhookEndpoint.id)
        .with_for_update()
    ).all()
    now = session.scalars(select(func.now())).one()
    num_changed = 0
    for endpoint in endpoints:
        try:
            num_changed += _reseal_endpoint(sealer, endpoint, now)
        except SecretKeyError as error:
            raise SecretKeyError(
                f"{error.message} Endpoint: {endpoint.id}. If that key is lost: UPDATE webhook_endpoints SET "
                "secret = '', old_secret = NULL; then every project rotates its endpoints' secrets."
            ) from error
    return num_changed


def reseal_secret(sealer: Sealer, stored: str) -> str:
    """Seal one stored secret, sealed with any key or plain, with the first key."""
    if sealer.opens_with_first(stored):
        return stored
    return sealer.seal(stored if is_secret(stored) else sealer.open(stored))


def _reseal_endpoint(sealer: Sealer, endpoint: WebhookEndpoint, now: datetime) -> bool:
    before = (endpoint.secret, endpoint.old_secret)
    if endpoint.secret != "":
        endpoint.secret = reseal_secret(sealer, endpoint.secret)
    if endpoint.old_secret is not None:
        expires_at = endpoint.old_secret_expires_at
        if expires_at is None or expires_at <= now:
            endpoint.old_secret = endpoint.old_secret_expires_at = None
        else:
            endpoint.old_secret = reseal_secret(sealer, endpoint.old_secret)
    return (endpoint.secret, endpoint.old_secret) != before
