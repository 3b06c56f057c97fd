"""What a delivery says and what becomes of it: the types of events, the thin payload, the outcome."""

import json
from dataclasses import dataclass

from luthier.core.states import JobStatus

_OF_STATUS = {
    JobStatus.SUCCEEDED: "fine_tuning.job.succeeded",
    JobStatus.FAILED: "fine_tuning.job.failed",
    JobStatus.CANCELLED: "fine_tuning.job.cancelled",
}
EVENT_TYPES = tuple(_OF_STATUS.values())


def event_type_of(status: JobStatus) -> str:
    """Return the type of the event that tells of a job's end."""
    return _OF_STATUS[status]


def payload(event_id: str, event_type: str, *, created_at: int, job_id: str) -> bytes:
    """Write the body of a delivery, byte for byte the same in every try.

    It is thin: who wants to know more asks for the job, and sees it as it is then.

    Args:
        event_id: `evt_…`, the same for every endpoint that hears of it.
        created_at: when the job ended, in Unix seconds.
    """
    event = {
        "id": event_id,
        "object": "event",
        "created_at": created_at,
        "type": event_type,
        "data": {"id": job_id},
    }
    return json.dumps(event, separators=(",", ":")).encode()


@dataclass(frozen=True)
class Message:
    """One delivery, ready to be sent.

    Args:
        webhook_id: the delivery's id, the same in every try.
        secrets: the active signing secrets, newest first.
    """

    webhook_id: str
    url: str
    body: bytes
    secrets: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """What came of one try: the receiver's HTTP status, or why there is none."""

    status_code: int | None = None
    error: str | None = None

    @property
    def is_success(self) -> bool:
        """Whether the receiver took it: any status from 200 to 299, and no other."""
        return self.status_code is not None and 200 <= self.status_code < 300
