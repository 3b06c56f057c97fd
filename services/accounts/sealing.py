"""Bringing stored secrets under the key that is in use: run at every start, by services.bootstrap."""

from datetime import datetime

from sqlalchemy import func, or_, select
from sqlalchemy.orm import Session

from db.tables import WebhookEndpoint
from luthier.core.errors import SecretKeyError
from luthier.webhooks.sealing import Sealer
from luthier.webhooks.signing import is_secret


def reseal(session: Session, sealer: Sealer) -> int:
    """Bring every signing secret under the first key, those too that an older version stored plainly.

    What is under it already stays as it is; old secrets that sign no more are erased.

    Raises:
        SecretKeyError: when there are secrets and no key, or one was sealed with another key; nothing is
            changed then.
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
    session.flush()
    return num_changed


def reseal_secret(sealer: Sealer, stored: str) -> str:
    """Bring one stored secret under the first key.

    Args:
        stored: sealed with any of them, or plain as older versions stored it.

    Raises:
        SecretKeyError: when there is no key, or it was sealed with another one.
    """
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
