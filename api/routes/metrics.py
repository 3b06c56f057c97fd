"""Metrics for Prometheus. They span all projects: reading them takes an admin key or their own token."""

import hmac
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response
from prometheus_client.exposition import choose_encoder
from starlette.concurrency import run_in_threadpool

from api.deps import AppStateDep, authenticate, bearer_key
from luthier.core.errors import PermissionDeniedError

router = APIRouter(tags=["health"])

_TEXT: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}


async def check_metrics_reader(request: Request, state: AppStateDep) -> None:
    """Require `LUTHIER_METRICS_TOKEN` or an admin key."""
    token = state.settings.metrics_token.get_secret_value()
    if token and hmac.compare_digest(bearer_key(request).encode(), token.encode()):
        return
    if not (await authenticate(request, state)).is_admin:
        raise PermissionDeniedError("This key can't read metrics; use an admin key or LUTHIER_METRICS_TOKEN.")


@router.get("/metrics", response_class=Response, responses=_TEXT)
async def metrics(
    request: Request, state: AppStateDep, _reader: Annotated[None, Depends(check_metrics_reader)]
) -> Response:
    """Report requests, jobs and workers in Prometheus' text format."""
    encode, media_type = choose_encoder(request.headers.get("accept", ""))
    # In a thread: it queries the database.
    return Response(await run_in_threadpool(encode, state.metrics.registry), media_type=media_type)
