"""HTTP's own business: bodies, errors, the internal token.

Knows nothing of models or chat_response.
"""

import hmac
import logging
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, ExceptionHandler, Receive, Scope, Send

from luthier.core.errors import LuthierError, NotFoundError, TooLargeError, UnauthenticatedError
from luthier.core.inference import HEADER_TOKEN
from luthier.core.settings import MIB
from luthier.inference.engine.error_reporting import log_fault, to_client_error
from luthier.inference.openai import chat_response

_LOG = logging.getLogger(__name__)

MAX_BODY_BYTES = 16 * MIB
# Where a request's scope keeps the fault that is in the log already.
_LOGGED = "luthier.logged_fault"


async def read_body(request: Request) -> bytes:
    """Read a request's body.

    Raises:
        TooLargeError: when it is longer than MAX_BODY_BYTES.
    """
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise TooLargeError(f"The request is larger than {MAX_BODY_BYTES // MIB} MiB.", param="messages")
    return bytes(body)


def json_response(value: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return a response with a value as JSON."""
    return Response(chat_response.encode_json(value), status, headers, media_type="application/json")


def _error_response(error: LuthierError) -> Response:
    headers = {"retry-after": str(error.retry_after_seconds)} if error.retryable else None
    return json_response(error.to_body(), status=error.http_status, headers=headers)


async def _on_luthier_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, LuthierError)
    return _error_response(error)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    body = NotFoundError(f"{request.method} {request.url.path[:80]} is not offered by the model server.")
    return json_response(body.to_body(), status=error.status_code)


async def _on_disconnect(_request: Request, _error: Exception) -> Response:
    # The client is gone; 499 is the customary status for the access log.
    return Response(status_code=499)


async def _on_fault(request: Request, error: Exception) -> Response:
    request.scope[_LOGGED] = error
    return _error_response(to_client_error(_LOG, "A request", error))


class FaultGate:
    """Log a fault by its kind and place, and keep it from the web server, which would log its text too."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            await self._app(scope, receive, send)
        except Exception as error:  # noqa: BLE001 - the process must outlive any fault of one request
            # Starlette raises it again after `_on_fault` answered. A response that had begun stays
            # incomplete, and the web server closes its connection.
            if scope.get(_LOGGED) is not error:
                log_fault(_LOG, "A request", error)


class TokenGate:
    """Refuse requests without the internal token.

    Args:
        token: the token, not empty.
    """

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._token = token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 401."""
        if scope["type"] == "http" and scope["path"] != "/healthz":
            headers = dict(scope["headers"])
            given = headers.get(HEADER_TOKEN.encode(), b"")
            if not given and scope["path"] == "/metrics":
                # Prometheus can send a bearer token everywhere, other headers only in newer versions.
                given = headers.get(b"authorization", b"").removeprefix(b"Bearer ")
            if not hmac.compare_digest(given, self._token):
                error = UnauthenticatedError(f"The header {HEADER_TOKEN} is missing or wrong.")
                await _error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)


EXCEPTION_HANDLERS: dict[type[Exception], ExceptionHandler] = {
    LuthierError: _on_luthier_error,
    HTTPException: _on_http_error,
    ClientDisconnect: _on_disconnect,
    Exception: _on_fault,
}
