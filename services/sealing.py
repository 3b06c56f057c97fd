"""Bringing stored secrets under the key that is in use: run at every start, by services.bootstrap."""

from sqlalchemy import select
from sqlalchemy.orm import Session

from db.webhook_tables import WebhookEndpoint
from luthier.core.errors import SecretKeyError
from luthier.core.sealing import Sealer
from luthier.webhooks.signing import is_secret


def reseal(session: Session, sealer: Sealer) -> int:
    """Seal every signing secret anew with the newest key, those too that an older version stored plainly.

    Args:
        session: the session.
        sealer: the keys.

    Returns:
        Endpoints whose secrets are sealed now.

    Raises:
        SecretKeyError: when there are secrets and no key, or one was sealed with another key; nothing is
            changed then.
    """
    endpoints = session.scalars(
        select(WebhookEndpoint)
        .where(WebhookEndpoint.secret != "")
        .order_by(WebhookEndpoint.id)
        .with_for_update()
    ).all()
    for endpoint in endpoints:
        try:
            endpoint.secret = _reseal(sealer, endpoint.secret)
            if endpoint.old_secret is not None:
                endpoint.old_secret = _reseal(sealer, endpoint.old_secret)
        except SecretKeyError as error:
            raise SecretKeyError(
                f"{error.message} Endpoint: {endpoint.id}. If that key is lost: UPDATE webhook_endpoints SET "
                "secret = '', old_secret = NULL; then every project rotates its endpoints' secrets."
            ) from error
    session.flush()
    return len(endpoints)


def _reseal(sealer: Sealer, stored: str) -> str:
    return sealer.seal(stored if is_secret(stored) else sealer.open(stored))
