"""The live stream of a job's events: server-sent events whose ids are the events' numbers."""

import asyncio
import json
from collections.abc import AsyncIterator

from starlette.concurrency import run_in_threadpool

from api.deps import AppState
from api.schemas.jobs import EventObject, event_object
from db.tables import Job
from luthier.core.errors import InvalidValueError, UnauthenticatedError, UnavailableError
from luthier.core.states import JobStatus
from luthier.inference.streaming import EventStream
from services.accounts import keys
from services.accounts.auth import Principal
from services.jobs import events, jobs

# How often a stream looks by itself, which is also how often an idle one shows that it lives.
_LOOK_SECONDS = 5.0
_BATCH = 200


async def read_job(state: AppState, principal: Principal, job_id: str) -> Job:
    """Read a job in a short transaction of its own; one that is not the project's is NotFoundError."""

    def read() -> Job:
        with state.database.transaction() as session:
            return jobs.get(session, principal, job_id)

    return await run_in_threadpool(read)


def _read_news(
    state: AppState, principal: Principal, job_id: str, seq: int
) -> tuple[list[tuple[int, EventObject]], bool]:
    with state.database.transaction() as session:
        # A key that was revoked meanwhile sees no more.
        keys.check_still_valid(session, principal)
        # The status is read first: a job seen as ended has no event after those read next.
        job = session.get(Job, job_id)
        is_over = job is None or JobStatus(job.status).is_terminal
        rows = events.list_after(session, job_id, seq=seq, limit=_BATCH)
        return [(row.seq, event_object(row)) for row in rows], is_over


async def _stream(state: AppState, principal: Principal, job_id: str, last_seq: int) -> AsyncIterator[bytes]:
    with state.hub.subscribe(job_id) as woken:
        while True:
            woken.clear()
            try:
                news, is_over = await run_in_threadpool(_read_news, state, principal, job_id, last_seq)
            except UnauthenticatedError as revoked:
                yield f"event: error\ndata: {json.dumps(revoked.to_body())}\n\n".encode()
                return
            for number, event in news:
                yield f"id: {number}\ndata: {json.dumps(event, separators=(',', ':'))}\n\n".encode()
                last_seq = number
            if len(news) == _BATCH:
                continue
            if is_over:
                yield b"data: [DONE]\n\n"
                return
            if state.hub.closing.is_set():
                error = UnavailableError("The service is shutting down; connect again with Last-Event-ID.")
                yield f"retry: 1000\nevent: error\ndata: {json.dumps(error.to_body())}\n\n".encode()
                return
            try:
                await asyncio.wait_for(woken.wait(), _LOOK_SECONDS)
            except TimeoutError:
                yield b": still here\n\n"


def event_stream_response(
    state: AppState, principal: Principal, job_id: str, last_event_id: str | None
) -> EventStream:
    """Answer with a job's events from the one after `last_event_id` on, until the job has ended.

    Args:
        job_id: a job that the caller may see.
        last_event_id: the Last-Event-ID header of a client that comes back.

    Returns:
        The stream; `data: [DONE]` follows a terminal event.

    Raises:
        InvalidValueError: when `last_event_id` is no number.
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
