"""The live stream of a job's events as server-sent events; an event's id is its number."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence

from sqlalchemy.orm import Session

from api.deps import AppState, run_in_transaction
from api.schemas.jobs import EventObject
from db.tables import Job, JobEvent
from luthier.core.errors import InvalidValueError, UnauthenticatedError, UnavailableError
from luthier.core.states import JobStatus
from luthier.inference.server.sse import EventStream
from services.accounts import keys
from services.accounts.auth import Principal
from services.jobs import events

# Between polls without a notification, and between keep-alive comments of an idle stream.
_POLL_SECONDS = 5.0
_BATCH = 200


def _read_events(
    session: Session, principal: Principal, job_id: str, seq: int
) -> tuple[Sequence[JobEvent], bool]:
    """Return the events after `seq`, and whether the job has ended."""
    # A key that was revoked meanwhile reads no more.
    keys.check_still_valid(session, principal)
    # The status first: a job that has ended then has no event after those read next.
    job = session.get(Job, job_id)
    is_over = job is None or JobStatus(job.status).is_terminal
    return events.list_after(session, job_id, seq=seq, limit=_BATCH), is_over


async def _stream(state: AppState, principal: Principal, job_id: str, last_seq: int) -> AsyncIterator[bytes]:
    with state.hub.subscribe(job_id) as woken:
        while True:
            woken.clear()
            try:
                rows, is_over = await run_in_transaction(state, _read_events, principal, job_id, last_seq)
            except UnauthenticatedError as revoked:
                yield f"event: error\ndata: {json.dumps(revoked.to_body())}\n\n".encode()
                return
            for row in rows:
                event = json.dumps(EventObject.of(row).model_dump(), separators=(",", ":"))
                yield f"id: {row.seq}\ndata: {event}\n\n".encode()
                last_seq = row.seq
            if len(rows) == _BATCH:
                continue
            if is_over:
                yield b"data: [DONE]\n\n"
                return
            if state.hub.closing.is_set():
                error = UnavailableError("The service is shutting down; connect again with Last-Event-ID.")
                yield f"retry: 1000\nevent: error\ndata: {json.dumps(error.to_body())}\n\n".encode()
                return
            try:
                await asyncio.wait_for(woken.wait(), _POLL_SECONDS)
            except TimeoutError:
                yield b": still here\n\n"


def event_stream_response(
    state: AppState, principal: Principal, job_id: str, last_event_id: str | None
) -> EventStream:
    """Stream the events of a job that the caller may see, until it has ended; `data: [DONE]` is last.

    Args:
        last_event_id: the Last-Event-ID header of a client that reconnects; its next event comes first.

    Raises:
        InvalidValueError: when `last_event_id` is not a number.
        TooManyRequestsError: when the project has too many open streams.
    """
    seq = 0
    if last_event_id:
        if not last_event_id.isdecimal() or len(last_event_id) > 18:
            raise InvalidValueError("Last-Event-ID: send the id of the last event as it came.")
        seq = int(last_event_id)
    state.event_streams.acquire(principal.project_id)

    async def release() -> None:
        state.event_streams.release(principal.project_id)

    return EventStream(_stream(state, principal, job_id, seq), release, {})
