"""What every request passes through first: its id, and one line of the access log at its end.

A line holds no text of users: ids, the route's template, the model's public name, numbers. Pure ASGI: a
BaseHTTPMiddleware would hide a client that leaves.
"""

import json
import sys
import time
from datetime import UTC, datetime
from typing import Any

import structlog
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.metrics import ApiMetrics
from api.usage_recorder import UsageRecorder
from luthier.core.ids import new_id
from services.accounts.auth import Principal
from services.accounts.usage import TokenCounts, UsageOwner

# What proxies log for a client that left before its answer.
_CLIENT_LEFT = 499


class RequestLogMiddleware:
    """Gives a request its id (`x-request-id`, and in every line of its log) and logs its end.

    Routes add to `request.state`: `caller` (a services.accounts.auth.Principal), `model` and `usage`.
    """

    def __init__(self, app: ASGIApp, *, metrics: ApiMetrics, usage: UsageRecorder, is_logged: bool) -> None:
        self._app = app
        self._usage = usage
        self._metrics = metrics
        self._is_logged = is_logged

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = new_id("request")
        arrived_at = time.monotonic()
        # What answers outside of this middleware, after a fault, finds the id here.
        state = scope.setdefault("state", {})
        state.update(request_id=request_id, arrived_at=arrived_at)
        status, is_complete, is_stream = _CLIENT_LEFT, False, False

        async def send_with_id(message: Message) -> None:
            nonlocal status, is_complete, is_stream
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
                message = {**message, "headers": headers}
                is_stream = Headers(raw=headers).get("content-type", "").startswith("text/event-stream")
                if is_stream:
                    self._metrics.open_streams.inc()
            else:
                is_complete = not message.get("more_body", False)
            await send(message)

        try:
            with structlog.contextvars.bound_contextvars(request_id=request_id):
                await self._app(scope, receive, send_with_id)
        except Exception:
            # Answered 500 outside of this middleware, or broken off where the answer had begun.
            status = 500
            raise
        finally:
            seconds = time.monotonic() - arrived_at
            if is_stream:
                self._metrics.open_streams.dec()
            self._metrics.observe_request(scope["method"], route_template(scope), status, seconds)
            self._count_tokens(state)
            if self._is_logged:
                _write(scope, status, is_complete, seconds)

    def _count_tokens(self, state: dict[str, Any]) -> None:
        used: TokenCounts | None = state.get("usage")
        caller: Principal | None = state.get("caller")
        # Nothing is known of a request that was refused, or whose client left before its answer began.
        if used is None or caller is None or not used.num_requests:
            return
        self._metrics.count_tokens(used)
        assert caller.key_id is not None
        owner = UsageOwner(caller.organization_id, caller.project_id, caller.key_id, state["model"])
        self._usage.add(owner, used)


def route_template(scope: Scope) -> str | None:
    """Return the template of a request's path, such as `/v1/files/{file_id}`; None where no route has it."""
    return getattr(scope.get("route"), "path_format", None)


def _write(scope: Scope, status: int, is_complete: bool, seconds: float) -> None:
    state = scope["state"]
    caller, usage = state.get("caller"), state.get("usage")
    line: dict[str, Any] = {
        "event": "request",
        "timestamp": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "request_id": state["request_id"],
        "key_id": caller and caller.key_id,
        "project_id": caller and caller.project_id,
        "method": scope["method"],
        "route": route_template(scope),
        "model": state.get("model"),
        "status": status,
        "is_complete": is_complete,
        "input_tokens": usage and usage.input_tokens,
        "output_tokens": usage and usage.output_tokens,
        "duration_seconds": round(seconds, 4),
    }
    sys.stdout.write(json.dumps(line, separators=(",", ":")) + "\n")
    sys.stdout.flush()
