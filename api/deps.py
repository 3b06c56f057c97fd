"""Dependencies of routes: the state of the process, a session, the caller's principal."""

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Annotated, cast

from fastapi import Depends, Request
from fastapi.security import HTTPBearer
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from api.body_budget import BodyBudget
from api.metrics import ApiMetrics
from api.project_places import ProjectPlaces
from api.streaming.event_hub import EventHub
from api.usage_recorder import UsageRecorder
from db.session import Database
from luthier.bases.catalogue import Catalogue
from luthier.core.errors import UnauthenticatedError, UnavailableError
from luthier.core.settings import Settings
from luthier.inference.backends.base import Backend
from luthier.storage.store import Storage
from luthier.webhooks.sealing import Sealer
from services.accounts import keys
from services.accounts.auth import Principal
from services.task_queue import Notify

# Requests that hold a connection at the same time.
NUM_TURNS = 16
_TURN_SECONDS = 3.0
# Estimates that are made at the same time: each counts tokens on all cores for a moment.
NUM_ESTIMATES = 2
# Reports on files that are made at the same time: each takes cores and memory for as long as its file is.
NUM_REPORTS = 2
# Large files whose rows are checked at the same time, each by a process: of one project, and of all. Each
# holds one of the 40 threads of the API, so that never all are held.
NUM_PROJECT_CHECKS = 2
NUM_CHECKS = min(16, max(8, 2 * (os.cpu_count() or 1)))


@dataclass
class AppState:
    """The state of one API process, created at start and passed to every route.

    SIGHUP replaces the catalogue, and nothing else.
    """

    settings: Settings
    database: Database
    storage: Storage
    catalogue: Catalogue
    backend: Backend
    hub: EventHub
    notify: Notify
    sealer: Sealer
    usage: UsageRecorder
    metrics: ApiMetrics
    event_streams: ProjectPlaces = field(default_factory=lambda: ProjectPlaces(50, what="event streams"))
    webhook_tests: ProjectPlaces = field(default_factory=lambda: ProjectPlaces(1, what="tests of webhooks"))
    bodies: BodyBudget = field(default_factory=BodyBudget)
    turns: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(NUM_TURNS))
    project_estimates: ProjectPlaces = field(
        default_factory=lambda: ProjectPlaces(1, what="estimates being made")
    )
    estimates: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(NUM_ESTIMATES))
    checks: ProjectPlaces = field(
        default_factory=lambda: ProjectPlaces(
            NUM_PROJECT_CHECKS, NUM_CHECKS, what="large files being checked"
        )
    )
    project_reports: ProjectPlaces = field(
        default_factory=lambda: ProjectPlaces(1, 64, what="reports on files being made")
    )
    reports: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(NUM_REPORTS))


async def get_app_state(request: Request) -> AppState:
    """Return the state of the process; async, so that it needs no thread."""
    state: AppState = request.app.state.shared
    return state


AppStateDep = Annotated[AppState, Depends(get_app_state)]


async def take_turn(state: AppStateDep) -> AsyncIterator[None]:
    """Let in only as many requests as there are connections for.

    A request takes its connection in one thread and runs in another. Were more let in, those that wait for
    a connection would hold every thread, and those that have one would wait for a thread.
    """
    try:
        async with asyncio.timeout(_TURN_SECONDS):
            await state.turns.acquire()
    except TimeoutError as error:
        raise UnavailableError("The service is busy right now; try again.") from error
    try:
        yield
    finally:
        state.turns.release()


def get_session(
    state: AppStateDep, _turn: Annotated[None, Depends(take_turn, scope="function")]
) -> Iterator[Session]:
    """Open the request's one transaction."""
    with state.database.transaction() as session:
        yield session


# scope="function": the commit comes before the answer, so that a failed one is never answered 200.
SessionDep = Annotated[Session, Depends(get_session, scope="function")]


# Puts the key into the OpenAPI document; the guards below read and check it.
bearer_scheme = HTTPBearer(
    auto_error=False, scheme_name="ApiKey", description="A key of `luthier keys create`, as a bearer token."
)


def bearer_key(request: Request) -> str:
    """Return the key of a request.

    Returns:
        The key in plain text.

    Raises:
        UnauthenticatedError: when there is none in the Authorization header.
    """
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not key.strip():
        raise UnauthenticatedError(
            "You didn't provide an API key. Send it in an Authorization header: 'Authorization: Bearer KEY'."
        )
    return key.strip()


def get_principal(request: Request, session: SessionDep) -> Principal:
    """Return the caller's principal, read in the request's own transaction."""
    request.state.caller = keys.authenticate(session, bearer_key(request))
    return cast(Principal, request.state.caller)


PrincipalDep = Annotated[Principal, Depends(get_principal)]


async def get_detached_principal(request: Request, state: AppStateDep) -> Principal:
    """Return the caller's principal from a short transaction of its own: for routes that then move bytes."""
    key = bearer_key(request)

    def read() -> Principal:
        with state.database.transaction() as session:
            return keys.authenticate(session, key)

    request.state.caller = await run_in_threadpool(read)
    return cast(Principal, request.state.caller)


DetachedPrincipalDep = Annotated[Principal, Depends(get_detached_principal)]
