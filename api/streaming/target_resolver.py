"""Resolves a request's API key and model name to its caller and a target, in a worker thread."""

import asyncio
from collections.abc import Callable
from typing import TypeVar, cast

from fastapi import Request
from starlette.concurrency import run_in_threadpool

from api.deps import AppState, bearer_key
from luthier.core.errors import LuthierError, UnavailableError
from luthier.core.inference import ModelTarget
from services.accounts import keys
from services.accounts.auth import Principal
from services.models import models

_TIMEOUT_SECONDS = 3.0

ResultT = TypeVar("ResultT")


async def authenticate(request: Request, state: AppState) -> Principal:
    """Return the caller that a request's key opens, which is noted in the request's state.

    Raises:
        UnauthenticatedError: when the key is missing, malformed, unknown or revoked.
        UnavailableError: when the database can't be reached, or does not answer in time.
    """
    key = bearer_key(request)

    def read() -> Principal:
        with state.database.transaction() as session:
            return keys.authenticate(session, key)

    request.state.caller = await _look_up(state, read)
    return cast(Principal, request.state.caller)


async def resolve_target(request: Request, state: AppState, name: str | LuthierError) -> ModelTarget:
    """Return what the inference server runs for a request, by one transaction; notes the caller as above.

    Args:
        name: the name that the request asks for, or what is wrong with it.

    Raises:
        UnauthenticatedError: when the key is missing, malformed, unknown or revoked.
        LuthierError: what is wrong with the name, once the key is good.
        ModelNotFoundError: when the caller's project has no such model.
        UnavailableError: when the database can't be reached, or does not answer in time.
    """
    key = bearer_key(request)

    def read() -> ModelTarget:
        with state.database.transaction() as session:
            request.state.caller = caller = keys.authenticate(session, key)
            if isinstance(name, LuthierError):
                raise name
            return models.resolve(session, caller, state.catalogue, name)

    return await _look_up(state, read)


async def _look_up(state: AppState, read: Callable[[], ResultT]) -> ResultT:
    """Run a short transaction in a thread. One that hangs keeps its turn, and its request waits no longer."""
    try:
        async with asyncio.timeout(_TIMEOUT_SECONDS):
            await state.turns.acquire()
            reading = asyncio.ensure_future(run_in_threadpool(read))

            def release(done: asyncio.Future[ResultT]) -> None:
                state.turns.release()
                if not done.cancelled():
                    # Its request may have been answered meanwhile.
                    done.exception()

            reading.add_done_callback(release)
            return await asyncio.shield(reading)
    except TimeoutError as error:
        raise UnavailableError("The database does not answer in time; try again.") from error
