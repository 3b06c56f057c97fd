"""Fine-tuning jobs: create, read, cancel, events, checkpoints, report."""

import hashlib
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import JSONResponse, Response
from sqlalchemy.orm import Session

from api.deps import AppStateDep, DetachedPrincipalDep, PrincipalDep, SessionDep, run_in_transaction
from api.job_estimate import estimate_in_thread
from api.schemas.answers import EVENT_STREAM
from api.schemas.base import ListPage, list_object
from api.schemas.jobs import (
    CheckpointObject,
    CreateJobBody,
    EventObject,
    JobEstimate,
    JobObject,
    JobReport,
    report_object,
)
from api.streaming.event_stream import event_stream_response
from db.tables import Job
from luthier.core.errors import InvalidTransitionError, InvalidValueError
from services.accounts.auth import Principal
from services.jobs import idempotency, jobs, pausing
from services.jobs.idempotency import RequestFingerprint

router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["fine_tuning"])

Limit = Annotated[int, Query(ge=0, le=1000)]


async def read_fingerprint(request: Request) -> RequestFingerprint:
    """Return what identifies a repetition of a request: key, body, and the SDK's count of retries."""
    key = request.headers.get("idempotency-key")
    if key is not None and not 1 <= len(key) <= 255:
        raise InvalidValueError("Idempotency-Key: use 1 to 255 characters.", param="Idempotency-Key")
    count = request.headers.get("x-stainless-retry-count", "0")
    return RequestFingerprint(
        route=f"{request.method} {request.scope['path']}",
        key=key,
        body_sha256=hashlib.sha256(await request.body()).hexdigest(),
        num_retries=int(count) if count.isdecimal() and len(count) <= 4 else 0,
        arrived_at=request.state.arrived_at,
    )


FingerprintDep = Annotated[RequestFingerprint, Depends(read_fingerprint)]


@router.post("")
def create_job(
    body: CreateJobBody,
    fingerprint: FingerprintDep,
    session: SessionDep,
    principal: PrincipalDep,
    state: AppStateDep,
) -> JobObject:
    """Create a job; the same create sent again, because its answer was lost, makes no second one."""
    earlier = idempotency.find_earlier(session, principal, fingerprint)
    if earlier is not None:
        return JobObject.of_job(jobs.get(session, principal, earlier))
    wanted = jobs.with_checked_integrations(session, state.settings, body.to_new_job())
    job = jobs.create(session, principal, state.catalogue, state.settings, state.notify, wanted)
    idempotency.remember(session, principal, fingerprint, resource_id=job.id)
    return JobObject.of_job(job)


@router.post("/estimate")
async def estimate_job(
    body: CreateJobBody, state: AppStateDep, principal: DetachedPrincipalDep
) -> JobEstimate:
    """Estimate what a job would take, from the body of a create; no job is made and nothing is stored."""
    found = await estimate_in_thread(state, principal, body.to_new_job())
    files = {"training_file": body.training_file, "validation_file": body.validation_file}
    return JobEstimate(**dict(found), **files)


def _metadata_filter(request: Request) -> tuple[dict[str, str], bool]:
    """Read `metadata[k]=v` (all must match) and `metadata=null` (jobs without any) from the query."""
    named = [
        (name[len("metadata[") : -1], value)
        for name, value in request.query_params.multi_items()
        if name.startswith("metadata[") and name.endswith("]")
    ]
    pairs = dict(named)
    if len(pairs) < len(named):
        raise InvalidValueError("metadata: a key is given twice; send each once.", param="metadata")
    text = request.query_params.get("metadata")
    if text is not None and (text != "null" or pairs):
        raise InvalidValueError(
            "metadata: use metadata[key]=value, or metadata=null alone.", param="metadata"
        )
    return pairs, text == "null"


@router.get("")
def list_jobs(
    request: Request,
    session: SessionDep,
    principal: PrincipalDep,
    after: str | None = None,
    limit: Limit = 20,
) -> ListPage[JobObject]:
    """List the project's jobs, newest first."""
    metadata, has_no_metadata = _metadata_filter(request)
    rows, has_more = jobs.list_(
        session, principal, after=after, limit=limit, metadata=metadata, has_no_metadata=has_no_metadata
    )
    return list_object([JobObject.of_job(row) for row in rows], has_more=has_more)


@router.get("/{fine_tuning_job_id}")
def retrieve_job(fine_tuning_job_id: str, session: SessionDep, principal: PrincipalDep) -> JobObject:
    """Describe one job."""
    return JobObject.of_job(jobs.get(session, principal, fine_tuning_job_id))


def _act_once(
    session: Session,
    principal: Principal,
    fingerprint: RequestFingerprint,
    job_id: str,
    act: Callable[[], Job],
) -> Job:
    """Do what a client asks of a job, once: a repetition of a request that was done succeeds, too.

    Raises:
        NotFoundError: when the project has no such job.
        InvalidTransitionError: when the job's status does not allow it.
    """
    if fingerprint.key is not None and idempotency.find_earlier(session, principal, fingerprint) is not None:
        return jobs.get(session, principal, job_id)
    try:
        job = act()
    except InvalidTransitionError:
        # The SDK's own retry of a request that was done and whose answer was lost.
        if idempotency.find_earlier(session, principal, fingerprint) is None:
            raise
        return jobs.get(session, principal, job_id)
    idempotency.remember(session, principal, fingerprint, resource_id=job.id)
    return job


@router.post("/{fine_tuning_job_id}/cancel")
def cancel_job(
    fine_tuning_job_id: str, fingerprint: FingerprintDep, session: SessionDep, principal: PrincipalDep
) -> JobObject:
    """Cancel a job that has not ended; published checkpoints stay callable."""
    act = partial(jobs.cancel, session, principal, fine_tuning_job_id)
    return JobObject.of_job(_act_once(session, principal, fingerprint, fine_tuning_job_id, act))


@router.post("/{fine_tuning_job_id}/pause")
def pause_job(
    fine_tuning_job_id: str, fingerprint: FingerprintDep, session: SessionDep, principal: PrincipalDep
) -> JobObject:
    """Pause a job that is queued or running; its slot is given back, and nothing of it is lost."""
    act = partial(pausing.pause, session, principal, fine_tuning_job_id)
    return JobObject.of_job(_act_once(session, principal, fingerprint, fine_tuning_job_id, act))


@router.post("/{fine_tuning_job_id}/resume")
def resume_job(
    fine_tuning_job_id: str,
    fingerprint: FingerprintDep,
    session: SessionDep,
    principal: PrincipalDep,
    state: AppStateDep,
) -> JobObject:
    """Resume a paused job from its newest save point."""
    act = partial(pausing.resume, session, principal, state.notify, fine_tuning_job_id)
    return JobObject.of_job(_act_once(session, principal, fingerprint, fine_tuning_job_id, act))


@router.get("/{fine_tuning_job_id}/checkpoints")
def list_checkpoints(
    fine_tuning_job_id: str,
    session: SessionDep,
    principal: PrincipalDep,
    after: str | None = None,
    limit: Limit = 10,
) -> ListPage[CheckpointObject]:
    """List a job's checkpoints, highest step first."""
    rows, has_more = jobs.list_checkpoints(session, principal, fine_tuning_job_id, after=after, limit=limit)
    data = [CheckpointObject.of_checkpoint(*row) for row in rows]
    return list_object(data, has_more=has_more, with_ids=True)


# Documented by the schema but not checked against it: reports of older versions are served as stored.
@router.get("/{fine_tuning_job_id}/report", response_model=None, responses={200: {"model": JobReport}})
def retrieve_report(fine_tuning_job_id: str, session: SessionDep, principal: PrincipalDep) -> dict[str, Any]:
    """Report what a job's files held, how training went and what it cost, as far as it is known."""
    return report_object(jobs.get(session, principal, fine_tuning_job_id))


_EVENTS: dict[int | str, dict[str, Any]] = {200: {"model": ListPage[EventObject], "content": EVENT_STREAM}}


@router.get("/{fine_tuning_job_id}/events", responses=_EVENTS)
async def list_events(
    fine_tuning_job_id: str,
    request: Request,
    state: AppStateDep,
    principal: DetachedPrincipalDep,
    after: str | None = None,
    limit: Limit = 20,
    stream: bool = False,
) -> Response:
    """List a job's events, newest first; with stream=true, send them as they happen, oldest first."""
    if stream:
        await run_in_transaction(state, jobs.get, principal, fine_tuning_job_id)
        last_event_id = request.headers.get("last-event-id")
        return event_stream_response(state, principal, fine_tuning_job_id, last_event_id)
    rows, has_more = await run_in_transaction(
        state, jobs.list_events, principal, fine_tuning_job_id, after=after, limit=limit
    )
    return JSONResponse(list_object([EventObject.of(row).model_dump() for row in rows], has_more=has_more))
