"""Whether the process lives, and whether it can serve."""

from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from typing_extensions import TypedDict

from api.readiness import ReadinessObject

router = APIRouter(tags=["health"])

_READINESS: dict[int | str, dict[str, Any]] = {
    200: {"model": ReadinessObject},
    503: {"model": ReadinessObject, "description": "It can't serve now"},
}


class LivenessObject(TypedDict):
    """That the process runs."""

    status: Literal["ok"]


@router.get("/healthz")
async def healthz() -> LivenessObject:
    """Answer as long as the process runs; no I/O."""
    return {"status": "ok"}


@router.get("/readyz", responses=_READINESS)
async def readyz(request: Request) -> JSONResponse:
    """Tell whether the database answers and has the schema that this code expects.

    Whether one inference server at least is ready is told beside it and decides nothing: files and jobs
    need none, and would be cut off where a proxy asks here.
    """
    found = await request.app.state.readiness.get()
    return JSONResponse(found, 200 if found["status"] == "ready" else 503)
