"""Rows of stored bytes. Bytes that get no row are deleted again; no transaction is open while bytes move."""

from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import TypeVar

from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from api.deps import AppState, run_in_transaction
from db.tables import Table
from luthier.core.errors import UnavailableError

T = TypeVar("T")


async def record_stored(
    state: AppState, storage_key: str, record: Callable[[Session], T], table: type[Table], row_id: str
) -> T:
    """Write the row of stored bytes by `record`, and return its result; on failure delete the bytes.

    A commit whose answer was lost may have succeeded: bytes with a row in `table` stay.
    """
    try:
        return await run_in_transaction(state, record)
    except Exception:
        with suppress(UnavailableError):
            if await run_in_transaction(state, Session.get, table, row_id) is None:
                await run_in_threadpool(state.storage.delete, storage_key)
        raise


async def delete_stored(state: AppState, keys: Iterable[str]) -> None:
    """Delete bytes that no row needs. Where storage is unavailable, a worker's garbage collection does it."""

    def delete() -> None:
        for key in keys:
            state.storage.delete(key)

    with suppress(UnavailableError):
        await run_in_threadpool(delete)
