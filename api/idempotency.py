"""Requests that may come twice: what tells that one is the same as another."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request
from sqlalchemy.orm import Session

from db.tables import Job
from luthier.core.errors import InvalidTransitionError, InvalidValueError
from services.accounts.auth import Principal
from services.jobs import idempotency, jobs
from services.jobs.idempotency import Sending


@dataclass(frozen=True)
class Sent:
    """A request as it came: its Idempotency-Key, its body's hash, the SDK's count of retries, its arrival."""

    key: str | None
    body_sha256: str
    num_retries: int
    arrived_at: float

    def to(self, route: str) -> Sending:
        """Return it as a request to a route, such as `POST /v1/fine_tuning/jobs`."""
        return Sending(route, self.key, self.body_sha256, self.num_retries, self.arrived_at)


def _num_retries(request: Request) -> int:
    count = request.headers.get("x-stainless-retry-count", "0")
    return int(count) if count.isdecimal() and len(count) <= 4 else 0


async def read_sent(request: Request) -> Sent:
    """Return what tells a request from another.

    Raises:
        InvalidValueError: when its Idempotency-Key is empty or too long.
    """
    key = request.headers.get("idempotency-key")
    if key is not None and not 1 <= len(key) <= 255:
        raise InvalidValueError("Idempotency-Key: use 1 to 255 characters.", param="Idempotency-Key")
    body_sha256 = hashlib.sha256(await request.body()).hexdigest()
    return Sent(key, body_sha256, _num_retries(request), request.state.arrived_at)


SentDep = Annotated[Sent, Depends(read_sent)]


def act_on_job(
    session: Session, principal: Principal, sent: Sent, verb: str, job_id: str, act: Callable[[], Job]
) -> Job:
    """Do what a client asks of a job, once: the same request again finds it done, which is no fault.

    Args:
        verb: the last part of its path, such as `cancel`.

    Returns:
        The job as it is now.

    Raises:
        NotFoundError: when the project has no such job.
        InvalidTransitionError: when the job's status does not allow it and this is no repeat of one that
            was done.
    """
    sending = sent.to(f"POST /v1/fine_tuning/jobs/{job_id}/{verb}")
    if sent.key is not None and idempotency.find_earlier(session, principal, sending) is not None:
        return jobs.get(session, principal, job_id)
    try:
        job = act()
    except InvalidTransitionError:
        # The SDK's own retry of a request that was done and whose answer was lost.
        if idempotency.find_earlier(session, principal, sending) is None:
            raise
        return jobs.get(session, principal, job_id)
    idempotency.remember(session, principal, sending, resource_id=job.id)
    return job
