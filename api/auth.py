"""Authentication: from a request's API key to its principal."""

import asyncio
from collections.abc import Callable
from typing import Annotated, TypeVar, cast

from fastapi import Depends, Request
from fastapi.security import HTTPBearer
from starlette.concurrency import run_in_threadpool

from api.deps import AppState, AppStateDep, SessionDep
from luthier.core.errors import UnauthenticatedError, UnavailableError
from services.accounts import keys
from services.accounts.auth import Principal

_LOOKUP_SECONDS = 3.0

T = TypeVar("T")

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


async def get_detached_principal(request: Request, state: AppStateDep) -> Principal:
    """Authenticate in a short transaction that ends before the route begins: for routes that move bytes."""
    request.state.principal = await run_in_threadpool(_authenticate, state, bearer_key(request))
    return cast(Principal, request.state.principal)


DetachedPrincipalDep = Annotated[Principal, Depends(get_detached_principal)]


async def authenticate(request: Request, state: AppState) -> Principal:
    """Authenticate outside of routes, within `look_up`'s limits.

    Raises:
        UnauthenticatedError: when the key is missing, malformed, unknown or revoked.
        UnavailableError: when the database can't be reached, or does not answer in time.
    """
    key = bearer_key(request)
    request.state.principal = await look_up(state, lambda: _authenticate(state, key))
    return cast(Principal, request.state.principal)


def _authenticate(state: AppState, key: str) -> Principal:
    with state.database.transaction() as session:
        return keys.authenticate(session, key)


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
