"""A limit on the body of every request, and a key before a large one."""

import re
from contextlib import ExitStack

from fastapi import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.body_budget import MAX_UNCOUNTED_BYTES
from api.deps import get_app_state
from api.errors import to_response
from api.streaming.target_resolver import authenticate
from luthier.core.errors import LuthierError, TooLargeError

# Routes that take more bound it themselves, while they read.
_UNLIMITED_PATHS = re.compile(r"/v1/(files|uploads/[^/]+/parts|chat/completions|completions|responses)")
# The largest job takes less. FastAPI parses a body on the event loop, which streams share.
_MAX_BODY_BYTES = 256 * 1024


class BodyLimitMiddleware:
    """Reads a JSON body before anything is parsed: of a large one no more than its key allows."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http" or _UNLIMITED_PATHS.fullmatch(scope["path"]):
            await self._app(scope, receive, send)
            return
        with ExitStack() as held:
            try:
                body = await _read(Request(scope), receive, held)
            except LuthierError as error:
                await to_response(error)(scope, receive, send)
                return
            if body is None:
                return
            is_given = False

            async def receive_whole() -> Message:
                nonlocal is_given
                if is_given:
                    return await receive()
                is_given = True
                return {"type": "http.request", "body": bytes(body), "more_body": False}

            await self._app(scope, receive_whole, send)


async def _read(request: Request, receive: Receive, held: ExitStack) -> bytearray | None:
    """Return the body, None when the client has left; what is large is counted until `held` ends."""
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
            caller = await authenticate(request, state)
            count = held.enter_context(state.bodies.hold(caller.project_id))
            count(len(body))
    return body
