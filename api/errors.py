"""Errors as HTTP answers with OpenAI's error body; the only place that turns an error into HTTP."""

from collections.abc import Iterator, Sequence
from typing import Any, cast, get_args
from urllib.parse import quote

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.routing import iter_route_contexts
from pydantic import BaseModel, Field
from sqlalchemy.exc import DataError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match
from starlette.types import Scope

from luthier.core.errors import (
    InvalidRequestError,
    InvalidTypeError,
    InvalidValueError,
    LuthierError,
    error_body,
    field_error,
    nearest_name,
)

_log = structlog.get_logger()
_LOCATIONS = {"body", "query", "path", "header"}
# pydantic's dictionaries and models are objects in JSON.
_OBJECT_TYPES = frozenset({"dict_type", "model_type", "model_attributes_type"})


class ErrorDetail(BaseModel):
    """What went wrong; docs/errors.md has every code."""

    message: str
    type: str
    param: str | None = Field(description="The offending field, dotted where it is inside another.")
    code: str | None


class ErrorBody(BaseModel):
    """The body of every error answer."""

    error: ErrorDetail


def shown_path(scope: Scope) -> str:
    """Return a request's path as the client sent it."""
    return cast(bytes, scope.get("raw_path") or quote(scope["path"]).encode()).decode("latin-1")


def to_response(error: LuthierError) -> JSONResponse:
    """Return the answer for an error."""
    headers = {}
    # 507: the disk is full, and repeated uploads only load the service.
    if error.retryable and error.http_status != 507:
        headers["Retry-After"] = str(error.retry_after_seconds)
    elif error.http_status in (408, 409, 429) or error.http_status >= 500:
        # The SDKs retry these statuses unless a permanent refusal says so.
        headers["x-should-retry"] = "false"
    return JSONResponse(error.to_body(), error.http_status, headers)


def from_validation(request: Request, errors: Sequence[Any]) -> LuthierError:
    """Turn pydantic's first finding into an error with the field's dotted path."""
    first = errors[0]
    # Only the first part is a location: a field may be called "body", too.
    path = [str(part) for depth, part in enumerate(first["loc"]) if depth or part not in _LOCATIONS]
    # Branches of a union add type names to the path, which clients do not know.
    param = ".".join(part for part in path if not part.startswith(("literal[", "constrained-"))) or None
    kind: str = first["type"]
    if kind == "json_invalid":
        return InvalidRequestError("The body is no valid JSON; send a JSON object.")
    if param is None and kind == "model_attributes_type":
        return InvalidTypeError("Send a JSON object as the body, with Content-Type: application/json.")
    needs_object = kind in _OBJECT_TYPES
    reason = "Send a JSON object." if needs_object else str(first["msg"]).removeprefix("Value error, ")
    text = f"Invalid value for '{param}': {reason}" if param else reason
    near = _nearest_field(request, path) if kind == "extra_forbidden" else None
    return field_error(kind, param, text, advice=f"Did you mean '{near}'?" if near else "Leave it out.")


def _nearest_field(request: Request, path: Sequence[str]) -> str | None:
    """Return the dotted path of the field whose name is most like an unknown one's; of equals its sibling."""
    body = getattr(request.scope.get("route"), "body_field", None)
    known = [] if body is None else list(_field_paths(body.field_info.annotation))
    near = nearest_name(path[-1], {one[-1] for one in known})
    alike = [one for one in known if one[-1] == near]
    found = min(alike, key=lambda one: one[:-1] != tuple(path[:-1]), default=None)
    return None if found is None else ".".join(found)


def _field_paths(annotation: Any, before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the path of each field of a type's models, nested ones too."""
    for part in (annotation, *get_args(annotation)):
        if isinstance(part, type) and issubclass(part, BaseModel):
            for name, field in part.model_fields.items():
                yield (*before, name)
                yield from _field_paths(field.annotation, (*before, name))


async def _on_luthier_error(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, LuthierError)
    return to_response(error)


async def _on_validation_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return to_response(from_validation(request, error.errors()))


async def _on_http_exception(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        path = shown_path(request.scope)[:120]
        message, code = f"Unknown request URL: {request.method} {path}.", "unknown_url"
        if not path.startswith("/v1/"):
            message += " A client's base URL ends in /v1."
    elif error.status_code == 405:
        message, code = f"{request.method} is not allowed for this URL.", "method_not_supported"
    else:
        message, code = str(error.detail), "invalid_request"
    headers = dict(error.headers or {})
    if error.status_code == 405:
        headers["Allow"] = ", ".join(_methods_of(request))
    body = error_body(message, "invalid_request_error", code, None)
    return JSONResponse(body, error.status_code, headers)


def _methods_of(request: Request) -> list[str]:
    """Return all methods of a URL; Starlette names only those of one matching route."""
    found: set[str] = set()
    for route in iter_route_contexts(request.app.routes):
        match, _ = route.matches(request.scope)
        if match is not Match.NONE:
            found |= route.methods or set()
    return sorted(found)


async def _on_disconnect(_request: Request, _error: Exception) -> Response:
    # Not sent: the status that proxies log for a client that closed the request.
    return Response(status_code=499)


async def _on_unstorable_text(_request: Request, _error: Exception) -> JSONResponse:
    return to_response(
        InvalidValueError(
            "The request holds a character that can't be stored: NUL, or half of a surrogate pair."
        )
    )


async def _on_unexpected(request: Request, error: Exception) -> JSONResponse:
    # Starlette calls this outside of all middleware, so the request id is added and logged here.
    request_id: str = getattr(request.state, "request_id", "")
    _log.error("unexpected error", path=request.url.path, request_id=request_id, exc_info=error)
    message = "The server had an error while processing your request. Its log has the request's id."
    body = error_body(message, "server_error", "server_error", None)
    return JSONResponse(body, 500, {"x-request-id": request_id})


def install(app: FastAPI) -> None:
    app.add_exception_handler(LuthierError, _on_luthier_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(DataError, _on_unstorable_text)
    app.add_exception_handler(UnicodeEncodeError, _on_unstorable_text)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    app.add_exception_handler(Exception, _on_unexpected)
