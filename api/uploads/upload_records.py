"""From durable bytes to a row: bytes that got none are deleted again. No transaction is open meanwhile."""

from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import TypeVar

from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from api.deps import AppState
from luthier.core.errors import UnavailableError

T = TypeVar("T")


async def record_stored(
    state: AppState, storage_key: str, record: Callable[[Session], T], is_recorded: Callable[[Session], bool]
) -> T:
    """Write the row of bytes that are durable.

    Args:
        storage_key: the bytes' key.
        is_recorded: whether the row is there, asked when the answer to its commit was lost.

    Returns:
        What `record` returned.
    """

    def write() -> T:
        with state.database.transaction() as session:
            return record(session)

    def drop_unrecorded() -> None:
        # A commit whose answer was lost may have happened: only bytes without a row are deleted.
        with state.database.transaction() as session:
            is_needed = is_recorded(session)
        if not is_needed:
            state.storage.delete(storage_key)

    try:
        return await run_in_threadpool(write)
    except Exception:
        with suppress(UnavailableError):
            await run_in_threadpool(drop_unrecorded)
        raise


async def drop_stored(state: AppState, keys: Iterable[str]) -> None:
    """Delete bytes that no row needs; what stays because storage is away, a worker tidies."""

    def drop() -> None:
        for key in keys:
            state.storage.delete(key)

    with suppress(UnavailableError):
        await run_in_threadpool(drop)
