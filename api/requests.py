"""A request's id on every answer, as pure ASGI: a BaseHTTPMiddleware would hide a client that leaves."""

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from luthier.core.ids import new_id


class RequestIdMiddleware:
    """Adds `x-request-id` to every answer and to every log line of the request."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = new_id("request")

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
                message = {**message, "headers": headers}
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            await self._app(scope, receive, send_with_id)
