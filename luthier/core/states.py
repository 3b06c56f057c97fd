"""The life of a job. Status changes only through this table; the database refuses the rest."""

from enum import StrEnum

from luthier.core.errors import InvalidTransitionError


class JobStatus(StrEnum):
    """Status of a fine-tuning job, as spelled on the wire."""

    VALIDATING_FILES = "validating_files"
    QUEUED = "queued"
    RUNNING = "running"
    PAUSING = "pausing"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_terminal(self) -> bool:
        """Whether no further change can follow."""
        return not TRANSITIONS[self]


_S = JobStatus

# running -> running is no move: a job continues only through `queued` and a new fencing token.
TRANSITIONS: dict[JobStatus, frozenset[JobStatus]] = {
    _S.VALIDATING_FILES: frozenset({_S.QUEUED, _S.FAILED, _S.CANCELLED}),
    _S.QUEUED: frozenset({_S.RUNNING, _S.PAUSED, _S.CANCELLED}),
    _S.RUNNING: frozenset({_S.QUEUED, _S.PAUSING, _S.SUCCEEDED, _S.FAILED, _S.CANCELLED}),
    _S.PAUSING: frozenset({_S.PAUSED, _S.QUEUED, _S.SUCCEEDED, _S.FAILED, _S.CANCELLED}),
    _S.PAUSED: frozenset({_S.QUEUED, _S.CANCELLED}),
    _S.SUCCEEDED: frozenset(),
    _S.FAILED: frozenset(),
    _S.CANCELLED: frozenset(),
}

TERMINAL_STATUSES = frozenset(status for status, targets in TRANSITIONS.items() if not targets)


def check_transition(source: JobStatus, target: JobStatus) -> None:
    """Refuse a change of status that the table does not hold.

    Raises:
        InvalidTransitionError: when `target` does not follow `source`.
    """
    if target not in TRANSITIONS[source]:
        raise InvalidTransitionError(f"A job that is {source.value} can't become {target.value}.")
