"""Whether the API can serve: asked by anybody, found out once a second at most."""

import asyncio
import time
from typing import Literal, NotRequired

from sqlalchemy import text
from sqlalchemy.exc import ProgrammingError
from starlette.concurrency import run_in_threadpool
from typing_extensions import TypedDict

from api.deps import AppState
from db.migrate import newest_revision
from luthier.core.errors import LuthierError, UnavailableError

# Less than who asks gives the whole answer.
_TIMEOUT_SECONDS = 0.9
_INFERENCE_SECONDS = 0.5
_KEPT_SECONDS = 1.0


class ReadinessObject(TypedDict):
    """Whether the API can serve, and why not. `inference` decides nothing: files and jobs need none."""

    status: Literal["ready", "unready"]
    revision: NotRequired[str | None]
    inference: NotRequired[Literal["ready", "unready"]]
    reason: NotRequired[str]


class Readiness:
    """The database's schema and the inference servers, as they were within the last second."""

    def __init__(self, state: AppState) -> None:
        self._state = state
        self._expected = newest_revision()
        self._checking: asyncio.Task[ReadinessObject] | None = None
        self._ready_at = 0.0

    async def get(self) -> ReadinessObject:
        """Return what was found; those that ask at the same time share one look."""
        if self._checking is None or (
            self._checking.done() and time.monotonic() - self._ready_at > _KEPT_SECONDS
        ):
            self._checking = asyncio.create_task(self._check())
        try:
            async with asyncio.timeout(_TIMEOUT_SECONDS):
                return await asyncio.shield(self._checking)
        except TimeoutError:
            return {"status": "unready", "reason": "The database does not answer in time."}

    async def _check(self) -> ReadinessObject:
        database, inference = await asyncio.gather(self._check_database(), self._can_answer())
        self._ready_at = time.monotonic()
        if database["status"] == "ready":
            database["inference"] = "ready" if inference else "unready"
        return database

    async def _check_database(self) -> ReadinessObject:
        try:
            revision = await run_in_threadpool(self._read_revision)
        except ProgrammingError:
            reason = "The database has no schema yet: run `python -m db.migrate`."
            return {"status": "unready", "reason": reason}
        except UnavailableError as error:
            return {"status": "unready", "reason": error.message}
        if revision != self._expected:
            reason = f"The schema is at {revision}, expected {self._expected}: run `python -m db.migrate`."
            return {"status": "unready", "reason": reason}
        return {"status": "ready", "revision": revision}

    def _read_revision(self) -> str | None:
        with self._state.database.transaction() as session:
            session.execute(text("SET LOCAL statement_timeout = '1s'"))
            revision: str | None = session.scalar(text("SELECT version_num FROM alembic_version"))
            return revision

    async def _can_answer(self) -> bool:
        try:
            async with asyncio.timeout(_INFERENCE_SECONDS):
                return (await self._state.backend.health()).is_ready
        except (LuthierError, TimeoutError):
            return False
