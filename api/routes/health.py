"""Whether the process lives, and whether it can serve."""

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from sqlalchemy import text
from sqlalchemy.exc import ProgrammingError
from starlette.concurrency import run_in_threadpool

from api.deps import PartsDep
from db.migrate import newest_revision
from luthier.core.errors import UnavailableError

router = APIRouter(tags=["health"])


@router.get("/healthz")
async def healthz() -> dict[str, str]:
    """Answer as long as the process runs; no I/O."""
    return {"status": "ok"}


@router.get("/readyz")
async def readyz(parts: PartsDep) -> JSONResponse:
    """Tell whether the database answers and has the schema that this code expects."""

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
    return JSONResponse({"status": "ready", "revision": revision})
