"""Whether the process lives, and whether it can serve."""

import asyncio

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from sqlalchemy import text
from sqlalchemy.exc import ProgrammingError
from starlette.concurrency import run_in_threadpool

from api.deps import Parts, PartsDep
from db.migrate import newest_revision
from luthier.core.errors import LuthierError, UnavailableError

router = APIRouter(tags=["health"])

# Less than who asks gives the whole answer.
_INFERENCE_SECONDS = 0.5


@router.get("/healthz")
async def healthz() -> dict[str, str]:
    """Answer as long as the process runs; no I/O."""
    return {"status": "ok"}


@router.get("/readyz")
async def readyz(parts: PartsDep) -> JSONResponse:
    """Tell whether the database answers and has the schema that this code expects.

    Whether one inference server at least is ready is told beside it and decides nothing: files and jobs
    need none, and would be cut off where a proxy asks here.
    """

    def read() -> str | None:
        with parts.database.transaction() as session:
            session.execute(text("SET LOCAL statement_timeout = '1s'"))
            revision: str | None = session.scalar(text("SELECT version_num FROM alembic_version"))
            return revision

    try:
        revision = await run_in_threadpool(read)
    except ProgrammingError:
        reason = "The database has no schema yet: run `python -m db.migrate`."
        return JSONResponse({"status": "unready", "reason": reason}, 503)
    except UnavailableError as error:
        return JSONResponse({"status": "unready", "reason": error.message}, 503)
    expected = newest_revision()
    if revision != expected:
        reason = f"The schema is at {revision}, expected {expected}: run `python -m db.migrate`."
        return JSONResponse({"status": "unready", "reason": reason}, 503)
    inference = "ready" if await _can_answer(parts) else "unready"
    return JSONResponse({"status": "ready", "revision": revision, "inference": inference})


async def _can_answer(parts: Parts) -> bool:
    try:
        async with asyncio.timeout(_INFERENCE_SECONDS):
            return (await parts.backend.health()).is_ready
    except (LuthierError, TimeoutError):
        return False
