"""A limit on the body of every request."""

import re

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.errors import to_response
from luthier.core.errors import TooLargeError

# Routes that take more bound it themselves, while they read.
_UNLIMITED_PATHS = re.compile(r"/v1/(files|uploads/[^/]+/parts|chat/completions|completions|responses)")
_MAX_BODY_BYTES = 1024 * 1024


class BodyLimitMiddleware:
    """Refuses a large JSON body before anything is parsed or anybody's key is looked at."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http" or _UNLIMITED_PATHS.fullmatch(scope["path"]):
            await self._app(scope, receive, send)
            return
        body, is_complete = bytearray(), False
        while not is_complete:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            is_complete = not message.get("more_body", False)
            if len(body) > _MAX_BODY_BYTES:
                error = TooLargeError(f"The body is larger than the limit of {_MAX_BODY_BYTES} bytes.")
                await to_response(error)(scope, receive, send)
                return
        is_given = False

        async def receive_whole() -> Message:
            nonlocal is_given
            if is_given:
                return await receive()
            is_given = True
            return {"type": "http.request", "body": bytes(body), "more_body": False}

        await self._app(scope, receive_whole, send)
