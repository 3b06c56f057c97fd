"""Middleware: request ids and the access log, limits of bodies, encoded slashes; unknown query parameters.

Pure ASGI: Starlette's BaseHTTPMiddleware hides a client's disconnect. No text of users is logged.
"""

import json
import re
import sys
import time
from contextlib import ExitStack
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote, unquote

import structlog
from fastapi import Request
from starlette.convertors import PathConvertor, StringConvertor, register_url_convertor
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.concurrency import MAX_UNCOUNTED_BYTES
from api.deps import authenticate, get_app_state
from api.errors import shown_path, to_response
from api.metrics import ApiMetrics, UsageRecorder
from luthier.core.errors import LuthierError, TooLargeError, UnknownParameterError
from luthier.core.ids import new_id
from luthier.core.inference import TokenCounts
from services.accounts.auth import Principal
from services.accounts.usage import UsageOwner

# The status that proxies log for a client that disconnects before its answer.
_CLIENT_DISCONNECTED = 499
# Routes with larger bodies bound them themselves, while reading.
_UNLIMITED_PATHS = re.compile(r"/v1/(files|uploads/[^/]+/parts|chat/completions|completions|responses)")
# The largest job takes less. FastAPI parses a body on the event loop, which streams share.
_MAX_BODY_BYTES = 256 * 1024
# An encoded slash in an id must not end its segment when the path is decoded: from before the routing until
# the handler gets its parameters it is this private character.
_SLASH = "\ue02f"
_ENCODED_SLASH = re.compile("%2f", re.IGNORECASE)
# Parameters that a route reads from the query by itself: this name, or any key of it in brackets.
_READ_BY_ROUTES = {"/v1/fine_tuning/jobs": "metadata"}


class RequestLogMiddleware:
    """Gives a request its id (`x-request-id`, and in every line of its log) and logs its end.

    Routes set `principal` (a Principal), `model` and `usage` in `request.state`.
    """

    def __init__(self, app: ASGIApp, *, metrics: ApiMetrics, usage: UsageRecorder, is_logged: bool) -> None:
        self._app = app
        self._usage = usage
        self._metrics = metrics
        self._is_logged = is_logged

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = new_id("request")
        arrived_at = time.monotonic()
        # Read outside of this middleware when the answer is a 500.
        state = scope.setdefault("state", {})
        state.update(request_id=request_id, arrived_at=arrived_at)
        status, is_complete, is_stream = _CLIENT_DISCONNECTED, False, False

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
            # Answered 500 outside of this middleware, or cut where the answer had begun.
            status = 500
            raise
        finally:
            seconds = time.monotonic() - arrived_at
            if is_stream:
                self._metrics.open_streams.dec()
            self._metrics.observe_request(scope["method"], _route_template(scope), status, seconds)
            self._count_tokens(state)
            if self._is_logged:
                _log_request(scope, status, is_complete, seconds)

    def _count_tokens(self, state: dict[str, Any]) -> None:
        used: TokenCounts | None = state.get("usage")
        principal: Principal | None = state.get("principal")
        # A request that was refused, or whose client disconnected before its answer began, has no usage.
        if used is None or principal is None or not used.num_requests:
            return
        self._metrics.count_tokens(used)
        assert principal.key_id is not None
        owner = UsageOwner(principal.organization_id, principal.project_id, principal.key_id, state["model"])
        self._usage.add(owner, used)


def _route_template(scope: Scope) -> str | None:
    """Return the template of a request's route, such as `/v1/files/{file_id}`; None without a route."""
    return getattr(scope.get("route"), "path_format", None)


def _log_request(scope: Scope, status: int, is_complete: bool, seconds: float) -> None:
    state = scope["state"]
    principal, usage = state.get("principal"), state.get("usage")
    line: dict[str, Any] = {
        "event": "request",
        "timestamp": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "request_id": state["request_id"],
        "key_id": principal and principal.key_id,
        "project_id": principal and principal.project_id,
        "method": scope["method"],
        "route": _route_template(scope),
        "model": state.get("model"),
        "status": status,
        "is_complete": is_complete,
        "input_tokens": usage and usage.input_tokens,
        "output_tokens": usage and usage.output_tokens,
        "duration_seconds": round(seconds, 4),
    }
    sys.stdout.write(json.dumps(line, separators=(",", ":")) + "\n")
    sys.stdout.flush()


class BodyLimitMiddleware:
    """Reads a JSON body before it is parsed, within a limit; a large one only for a known key."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or _UNLIMITED_PATHS.fullmatch(scope["path"]):
            await self._app(scope, receive, send)
            return
        with ExitStack() as held:
            try:
                body = await _read_body(Request(scope), receive, held)
            except LuthierError as error:
                await to_response(error)(scope, receive, send)
                return
            if body is None:
                return
            is_sent = False

            async def receive_whole() -> Message:
                nonlocal is_sent
                if is_sent:
                    return await receive()
                is_sent = True
                return {"type": "http.request", "body": bytes(body), "more_body": False}

            await self._app(scope, receive_whole, send)


async def _read_body(request: Request, receive: Receive, held: ExitStack) -> bytearray | None:
    """Return the body, or None after a disconnect; a large body is counted until `held` ends."""
    body, count, is_complete = bytearray(), None, False
    while not is_complete:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        chunk = message.get("body", b"")
        body += chunk
        is_complete = not message.get("more_body", False)
        if len(body) > _MAX_BODY_BYTES:
            raise TooLargeError(f"The body is larger than the limit of {_MAX_BODY_BYTES} bytes.")
        if count is not None:
            count(len(chunk))
        elif len(body) > MAX_UNCOUNTED_BYTES:
            state = await get_app_state(request)
            principal = await authenticate(request, state)
            count = held.enter_context(state.bodies.hold(principal.project_id))
            count(len(body))
    return body


class EncodedSlashMiddleware:
    """Keeps `%2F` from splitting a segment of the path."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and b"%2f" in scope.get("raw_path", b"").lower():
            # Not a copy: outer middleware reads the route from this scope.
            scope["path"] = unquote(_ENCODED_SLASH.sub(quote(_SLASH), shown_path(scope)))
        await self._app(scope, receive, send)


class _Segment(StringConvertor):
    def convert(self, value: str) -> str:
        return value.replace(_SLASH, "/")


class _Path(PathConvertor):
    def convert(self, value: str) -> str:
        return value.replace(_SLASH, "/")


def restore_slashes_in_parameters() -> None:
    """Make path parameters of all routes get their slashes back; called before the first route is made."""
    register_url_convertor("str", _Segment())
    register_url_convertor("path", _Path())


def refuse_unknown_query(request: Request) -> None:
    """Raise UnknownParameterError for a query parameter that the route does not have in the OpenAPI document.

    A filter with a typo would otherwise let everything through.
    """
    if not request.query_params:
        return
    path = request.scope["route"].path_format
    operations = request.app.openapi()["paths"].get(path, {})
    method = "get" if request.method == "HEAD" else request.method.lower()
    documented = operations.get(method, {}).get("parameters", [])
    known = [one["name"] for one in documented if one["in"] == "query"]
    own = _READ_BY_ROUTES.get(path)
    for name in request.query_params:
        if name in (*known, own) or (own is not None and name.startswith(f"{own}[") and name.endswith("]")):
            continue
        there = ", ".join([*known, *([own] if own else [])])
        advice = f"This URL takes {there}." if there else "This URL takes none."
        raise UnknownParameterError(f"Unknown query parameter: '{name[:80]}'. {advice}", param=name[:80])
