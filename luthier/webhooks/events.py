"""The types of events, the thin payload of a delivery, and its outcome."""

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
    return _OF_STATUS[status]


def payload(event_id: str, event_type: str, *, created_at: int, job_id: str) -> bytes:
    """Return the body of a delivery, byte for byte the same in every try: the job's id and no more.

    `event_id` is the same for every endpoint; `created_at` is when the job ended, in Unix seconds.
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
    """One delivery, ready to be sent: its id, the same in every try, and the active secrets, newest first."""

    webhook_id: str
    url: str
    body: bytes
    secrets: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """The outcome of one try: the receiver's HTTP status, or why there is none."""

    status_code: int | None = None
    error: str | None = None

    @property
    def is_success(self) -> bool:
        """Whether the receiver took it: any status from 200 to 299, and no other."""
        return self.status_code is not None and 200 <= self.status_code < 300
