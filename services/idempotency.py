"""One create for one intention, however often it is sent.

A caller may send Idempotency-Key. The OpenAI SDK sends none, yet repeats a POST whose answer was lost and
says so in x-stainless-retry-count; such a retry is matched by key id, route and body within ten minutes.
"""

from datetime import timedelta

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from db.queries import lock_key
from db.tables import IdempotencyKey
from luthier.core.errors import IdempotencyKeyReusedError
from luthier.core.ids import new_id
from services.scope import Scope

_RETRY_WINDOW = timedelta(minutes=10)


def find_earlier(
    session: Session, scope: Scope, *, route: str, key: str | None, body_sha256: str, num_retries: int
) -> str | None:
    """Return the id of what the same create made before, or None when it is new.

    The caller holds the lock taken here until its transaction ends, so that twins sent at the same
    time make one thing.

    Args:
        session: the session.
        scope: the caller.
        route: such as `POST /v1/fine_tuning/jobs`.
        key: the Idempotency-Key, if any.
        body_sha256: hex digest of the request's body.
        num_retries: the client's count of retries of this request.

    Returns:
        The id, or None.

    Raises:
        IdempotencyKeyReusedError: when the key came before with another body.
    """
    lock_key(session, f"{scope.project_id} {route} {key or f'{scope.key_id} {body_sha256}'}")
    if key is not None:
        earlier = session.scalar(
            select(IdempotencyKey).where(
                IdempotencyKey.project_id == scope.project_id,
                IdempotencyKey.route == route,
                IdempotencyKey.key == key,
            )
        )
        if earlier is not None and earlier.body_sha256 != body_sha256:
            raise IdempotencyKeyReusedError(
                "This Idempotency-Key came before with another body; use a new key for a new request."
            )
        return None if earlier is None else earlier.resource_id
    if num_retries == 0:
        return None
    return session.scalar(
        select(IdempotencyKey.resource_id)
        .where(
            IdempotencyKey.created_by_key_id == scope.key_id,
            IdempotencyKey.route == route,
            IdempotencyKey.body_sha256 == body_sha256,
            IdempotencyKey.created_at > func.now() - _RETRY_WINDOW,
        )
        .order_by(IdempotencyKey.created_at.desc())
        .limit(1)
    )


def remember(
    session: Session, scope: Scope, *, route: str, key: str | None, body_sha256: str, resource_id: str
) -> None:
    """Note what a create made, in the transaction that made it."""
    session.add(
        IdempotencyKey(
            id=new_id("request"),
            **scope.columns(),
            route=route,
            key=key,
            body_sha256=body_sha256,
            resource_id=resource_id,
        )
    )
    session.flush()
