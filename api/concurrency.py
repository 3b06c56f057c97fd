"""Requests that read whole files: a few at a time, each in a thread of its own; and the base they use."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

import anyio
import anyio.to_thread

from api.deps import AppState
from luthier.bases.catalogue import find_base_facts
from luthier.core.errors import ModelNotAvailableError, UnavailableError
from luthier.core.specs import BaseFacts

T = TypeVar("T")

_WAIT_SECONDS = 20.0


@asynccontextmanager
async def turn(places: asyncio.Semaphore, *, told: str) -> AsyncIterator[None]:
    """Hold one of a few places; others wait for it without a thread.

    Args:
        told: what a client hears who has waited for longer than one can.

    Yields:
        Nothing, while the place is held.

    Raises:
        UnavailableError: when none was free in time.
    """
    try:
        async with asyncio.timeout(_WAIT_SECONDS):
            await places.acquire()
    except TimeoutError as error:
        raise UnavailableError(told) from error
    try:
        yield
    finally:
        places.release()


async def run_apart(work: Callable[[], T]) -> T:
    """Run something long in a thread that is none of those that serve requests."""
    return await anyio.to_thread.run_sync(work, limiter=anyio.CapacityLimiter(1))


def get_base_here(state: AppState, base_id: str, *, param: str) -> BaseFacts:
    """Return the facts of a base that is on this machine.

    Raises:
        ModelNotAvailableError: when it is not here.
    """
    facts = find_base_facts(state.settings.bases_dir, base_id)
    if facts is None:
        raise ModelNotAvailableError(
            f"{param}: {base_id} is not on the API's machine, which counts tokens with it. Operator: luthier "
            f"bases fetch {base_id}.",
            param=param,
        )
    return facts
