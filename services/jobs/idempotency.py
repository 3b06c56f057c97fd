"""Idempotent creates: a request that is sent again changes nothing.

A client may send Idempotency-Key. The OpenAI SDK sends none, but repeats a POST whose answer was lost, with
x-stainless-retry-count; such a retry is matched by key id, route and body within ten minutes.
"""

import time
from dataclasses import dataclass, field
from datetime import timedelta

from sqlalchemy import ColumnElement, func, select
from sqlalchemy.orm import Session

from db.queries import delete_some, lock_key
from db.tables import IdempotencyKey
from luthier.core.errors import IdempotencyKeyReusedError
from luthier.core.ids import new_id
from services.accounts.auth import Principal

_RETRY_WINDOW = timedelta(minutes=10)
_KEPT = timedelta(days=1)


@dataclass(frozen=True)
class RequestFingerprint:
    """One request on its way.

    Args:
        body_sha256: hex digest of the request's body.
        arrived_at: when it arrived, on this process's monotonic clock, in seconds.
    """

    route: str
    key: str | None
    body_sha256: str
    num_retries: int
    arrived_at: float = field(default_factory=time.monotonic)


def find_earlier(session: Session, principal: Principal, request: RequestFingerprint) -> str | None:
    """Return the id of what the same request made before, or None when it is new.

    The lock taken here lasts until the transaction ends, so that concurrent duplicates make one thing.
    """
    route, key, body_sha256 = request.route, request.key, request.body_sha256
    lock_key(session, f"{principal.project_id} {route} {key or f'{principal.key_id} {body_sha256}'}")
    if key is not None:
        earlier = session.scalar(
            select(IdempotencyKey).where(
                IdempotencyKey.project_id == principal.project_id,
                IdempotencyKey.route == route,
                IdempotencyKey.key == key,
            )
        )
        if earlier is not None and earlier.body_sha256 != body_sha256:
            raise IdempotencyKeyReusedError(
                "This Idempotency-Key came before with another body; use a new key for a new request."
            )
        return None if earlier is None else earlier.resource_id
    return session.scalar(
        select(IdempotencyKey.resource_id)
        .where(
            IdempotencyKey.created_by_key_id == principal.key_id,
            IdempotencyKey.route == route,
            IdempotencyKey.body_sha256 == body_sha256,
            IdempotencyKey.key.is_(None),
            *_is_the_same(request),
        )
        .order_by(IdempotencyKey.created_at.desc())
        .limit(1)
    )


def _is_the_same(request: RequestFingerprint) -> list[ColumnElement[bool]]:
    """Return the conditions under which an equal body without a key is the same request."""
    if request.num_retries > 0:
        return [IdempotencyKey.created_at > func.clock_timestamp() - _RETRY_WINDOW]
    # A first try that its own retry has overtaken: the retry made the thing while this one waited here.
    waited = timedelta(seconds=time.monotonic() - request.arrived_at)
    return [
        IdempotencyKey.num_retries > 0,
        IdempotencyKey.created_at > func.clock_timestamp() - waited,
    ]


def prune(session: Session, *, limit: int) -> int:
    """Delete keys that are older than a day, at most `limit`; return how many."""
    return delete_some(session, IdempotencyKey, IdempotencyKey.created_at < func.now() - _KEPT, limit=limit)


def remember(
    session: Session, principal: Principal, request: RequestFingerprint, *, resource_id: str
) -> None:
    """Note what a request made or changed, in the transaction that did it."""
    session.add(
        IdempotencyKey(
            id=new_id("request"),
            **principal.owner_columns(),
            route=request.route,
            key=request.key,
            body_sha256=request.body_sha256,
            num_retries=request.num_retries,
            resource_id=resource_id,
            # Not when the transaction began: that may have been before its twin arrived.
            created_at=func.clock_timestamp(),
        )
    )
