"""Liveness and readiness of the process."""

import asyncio
import time
from typing import Any, Literal, NotRequired

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from sqlalchemy import text
from sqlalchemy.exc import ProgrammingError
from starlette.concurrency import run_in_threadpool
from typing_extensions import TypedDict

from api.deps import AppState
from db.migrate import newest_revision
from luthier.core.errors import LuthierError, UnavailableError

router = APIRouter(tags=["health"])

# Shorter than the timeouts of common readiness probes.
_TIMEOUT_SECONDS = 0.9
_INFERENCE_SECONDS = 0.5
_KEPT_SECONDS = 1.0


class LivenessObject(TypedDict):
    """That the process runs."""

    status: Literal["ok"]


class ReadinessObject(TypedDict):
    """Whether the API can serve, and why not. `inference` decides nothing: files and jobs need none."""

    status: Literal["ready", "unready"]
    revision: NotRequired[str | None]
    inference: NotRequired[Literal["ready", "unready"]]
    reason: NotRequired[str]


class Readiness:
    """The state of the database's schema and of the inference servers, at most a second old."""

    def __init__(self, state: AppState) -> None:
        self._state = state
        self._expected = newest_revision()
        self._checking: asyncio.Task[ReadinessObject] | None = None
        self._ready_at = 0.0

    async def get(self) -> ReadinessObject:
        """Return the readiness; concurrent requests share one check."""
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


_READINESS: dict[int | str, dict[str, Any]] = {
    200: {"model": ReadinessObject},
    503: {"model": ReadinessObject, "description": "It can't serve now"},
}


@router.get("/healthz")
async def healthz() -> LivenessObject:
    """Answer as long as the process runs; no I/O."""
    return {"status": "ok"}


@router.get("/readyz", responses=_READINESS)
async def readyz(request: Request) -> JSONResponse:
    """Say whether the database answers and has the schema that this code expects.

    Whether at least one inference server is ready is reported beside it and decides nothing: files and jobs
    need none, and would be cut off where a proxy checks this.
    """
    found = await request.app.state.readiness.get()
    return JSONResponse(found, 200 if found["status"] == "ready" else 503)
