"""Dependencies of routes: the state of the process, the request's session, and its API key's principal."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Concatenate, ParamSpec, TypeVar, cast

from fastapi import Depends, Request
from fastapi.security import HTTPBearer
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from api.concurrency import BodyBudget, LongWork, ProjectLimiter
from api.metrics import ApiMetrics, UsageRecorder
from api.streaming.event_hub import EventHub
from db.session import Database
from luthier.bases.catalogue import Catalogue, find_base_facts
from luthier.core.errors import ModelNotAvailableError, UnauthenticatedError, UnavailableError
from luthier.core.settings import Settings
from luthier.core.specs import BaseFacts
from luthier.serving.base import Backend
from luthier.storage.store import Storage
from luthier.webhooks.sealing import Sealer
from services.accounts import keys
from services.accounts.auth import Principal
from services.task_queue import Notify

P = ParamSpec("P")
T = TypeVar("T")

# Requests that use the database at the same time, each with a connection.
MAX_DATABASE_REQUESTS = 16
_DATABASE_WAIT_SECONDS = 3.0
_LOOKUP_SECONDS = 3.0
# An estimate counts tokens on all cores for a moment; a report holds cores and memory for its whole file.
_NUM_ESTIMATES = 2
_NUM_REPORTS = 2
# Checks of large files, each a process and one of the API's 40 threads: of one project, and of all.
_NUM_PROJECT_CHECKS = 2
_NUM_CHECKS = min(16, max(8, 2 * (os.cpu_count() or 1)))


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
    event_streams: ProjectLimiter = field(default_factory=lambda: ProjectLimiter(50, what="event streams"))
    webhook_tests: ProjectLimiter = field(default_factory=lambda: ProjectLimiter(1, what="tests of webhooks"))
    checks: ProjectLimiter = field(
        default_factory=lambda: ProjectLimiter(
            _NUM_PROJECT_CHECKS, _NUM_CHECKS, what="large files being checked"
        )
    )
    bodies: BodyBudget = field(default_factory=BodyBudget)
    estimates: LongWork = field(
        default_factory=lambda: LongWork(
            _NUM_ESTIMATES,
            ProjectLimiter(1, what="estimates being made"),
            busy="Other estimates are being made; try again.",
        )
    )
    reports: LongWork = field(
        default_factory=lambda: LongWork(
            _NUM_REPORTS,
            ProjectLimiter(1, 64, what="reports on files being made"),
            busy="Other files are being reported on; try again.",
        )
    )
    database_requests: asyncio.Semaphore = field(
        default_factory=lambda: asyncio.Semaphore(MAX_DATABASE_REQUESTS)
    )


async def get_app_state(request: Request) -> AppState:
    """Return the state of the process; async, so that it needs no thread."""
    state: AppState = request.app.state.shared
    return state


AppStateDep = Annotated[AppState, Depends(get_app_state)]


async def limit_database_requests(state: AppStateDep) -> AsyncIterator[None]:
    """Admit only as many requests as there are connections.

    A request takes its connection in one thread and runs in another. With more requests, those waiting for a
    connection would hold every thread, and those that have one would wait for a thread.
    """
    try:
        async with asyncio.timeout(_DATABASE_WAIT_SECONDS):
            await state.database_requests.acquire()
    except TimeoutError as error:
        raise UnavailableError("The service is busy right now; try again.") from error
    try:
        yield
    finally:
        state.database_requests.release()


def get_session(
    state: AppStateDep, _limit: Annotated[None, Depends(limit_database_requests, scope="function")]
) -> Iterator[Session]:
    with state.database.transaction() as session:
        yield session


# scope="function": the commit precedes the answer, so that a failed one is never answered 200.
SessionDep = Annotated[Session, Depends(get_session, scope="function")]


async def run_in_transaction(
    state: AppState, act: Callable[Concatenate[Session, P], T], *args: P.args, **options: P.kwargs
) -> T:
    """Call a function with a session in a thread, in a short transaction of its own."""

    def run() -> T:
        with state.database.transaction() as session:
            return act(session, *args, **options)

    return await run_in_threadpool(run)


# Documents the key in OpenAPI; the functions below check it.
bearer_scheme = HTTPBearer(
    auto_error=False, scheme_name="ApiKey", description="A key of `luthier keys create`, as a bearer token."
)


def bearer_key(request: Request) -> str:
    """Return the key in a request's Authorization header, or raise UnauthenticatedError."""
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not key.strip():
        raise UnauthenticatedError(
            "You didn't provide an API key. Send it in an Authorization header: 'Authorization: Bearer KEY'."
        )
    return key.strip()


def get_principal(request: Request, session: SessionDep) -> Principal:
    """Authenticate in the request's own transaction."""
    request.state.principal = keys.authenticate(session, bearer_key(request))
    return cast(Principal, request.state.principal)


PrincipalDep = Annotated[Principal, Depends(get_principal)]


async def authenticate(request: Request, state: AppStateDep) -> Principal:
    """Authenticate in a short transaction, within `look_up`'s limits: for routes that move bytes.

    Raises:
        UnauthenticatedError: when the key is missing, malformed, unknown or revoked.
        UnavailableError: when the database can't be reached, or does not answer in time.
    """
    key = bearer_key(request)

    def read() -> Principal:
        with state.database.transaction() as session:
            return keys.authenticate(session, key)

    request.state.principal = await look_up(state, read)
    return cast(Principal, request.state.principal)


DetachedPrincipalDep = Annotated[Principal, Depends(authenticate)]


async def look_up(state: AppState, read: Callable[[], T]) -> T:
    """Run a short transaction in a thread, for at most 3 s.

    One that hangs still counts among the requests that use the database.
    """
    try:
        async with asyncio.timeout(_LOOKUP_SECONDS):
            await state.database_requests.acquire()
            reading = asyncio.ensure_future(run_in_threadpool(read))

            def release(done: asyncio.Future[T]) -> None:
                state.database_requests.release()
                if not done.cancelled():
                    # Its request may have been answered meanwhile.
                    done.exception()

            reading.add_done_callback(release)
            return await asyncio.shield(reading)
    except TimeoutError as error:
        raise UnavailableError("The database does not answer in time; try again.") from error


def get_local_base(state: AppState, base_id: str, *, param: str) -> BaseFacts:
    """Return the facts of a base on this machine, or raise ModelNotAvailableError."""
    facts = find_base_facts(state.settings.bases_dir, base_id)
    if facts is None:
        raise ModelNotAvailableError(
            f"{param}: {base_id} is not on the API's machine, which counts tokens with it. Operator: luthier "
            f"bases fetch {base_id}.",
            param=param,
        )
    return facts
