"""Chat, completions and responses: the name is resolved here, the answer is the inference server's."""

import json

from fastapi import APIRouter, Request
from fastapi.responses import Response
from starlette.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send

from api.breaking_off import RESPONSES_PATH, StreamEnd
from api.deps import Parts, PartsDep, bearer_key, get_scope_apart
from api.leaving import UntilLeft
from api.passing import PieceSender
from api.requests import SEND_PIECE
from luthier.core.errors import (
    InvalidRequestError,
    InvalidTypeError,
    LuthierError,
    MissingParameterError,
    TooLargeError,
    UnavailableError,
)
from luthier.core.inference import ModelTarget
from luthier.inference.backends.base import Backend, Reply
from services.targets import Call

router = APIRouter(prefix="/v1", tags=["inference"])

_MAX_BODY_BYTES = 8 * 1024 * 1024
_MAX_SHORT_BYTES = 16 * 1024


class _PassedOn(Response):
    """An inference server's answer, asked for and passed on; the server is told when the client has left.

    Args:
        body: of the request, as it came.
    """

    def __init__(self, backend: Backend, path: str, body: bytes, target: ModelTarget) -> None:
        super().__init__()
        self._backend, self._path, self._target = backend, path, target
        self._asked = body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Ask, and pass on what comes.

        Args:
            receive: tells when its client leaves.

        Raises:
            LuthierError: what the server could not be asked for, or why it broke off in the middle of an
                answer that is no stream.
        """
        async with UntilLeft(receive):
            reply = await self._backend.complete(self._path, self._asked, self._target)
            try:
                await self._pass_on(reply, scope, send)
            finally:
                await reply.body.aclose()

    async def _pass_on(self, reply: Reply, scope: Scope, send: Send) -> None:
        """Pass the pieces on; a stream that breaks off ends with an error that clients read."""
        headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in reply.headers.items()]
        await send({"type": "http.response.start", "status": reply.status, "headers": headers})
        end, sender = StreamEnd(self._path), PieceSender(scope.get(SEND_PIECE, send))

        def take(piece: bytes) -> bool:
            is_sent = sender.try_send(piece)
            if is_sent:
                end.pass_on(piece)
            return is_sent

        if reply.pass_to is not None:
            reply.pass_to(take)
        try:
            async for piece in reply.body:
                end.pass_on(piece)
                await sender.send(piece)
            await sender.drain()
        except UnavailableError as error:
            if not reply.headers.get("content-type", "").startswith("text/event-stream"):
                raise
            await sender.send(end.broken_off(error))
        finally:
            sender.close()
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _read_body(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > _MAX_BODY_BYTES:
            raise TooLargeError(f"The request is larger than {_MAX_BODY_BYTES} bytes.", param="messages")
    return bytes(body)


def _model_name(body: bytes) -> str | LuthierError:
    """Return the name that a request asks for, or what is wrong with it: whoever has no key isn't told."""
    try:
        parsed = json.loads(body)
    except (ValueError, RecursionError):
        return InvalidRequestError("The body is no valid JSON; send a JSON object.")
    if not isinstance(parsed, dict):
        return InvalidTypeError("The body must be a JSON object.")
    model = parsed.get("model")
    if model is None:
        return MissingParameterError("Missing required parameter: 'model'.", param="model")
    if not isinstance(model, str):
        return InvalidTypeError("Invalid type for 'model': expected a string.", param="model")
    return model


async def _answer(request: Request, parts: Parts, path: str) -> Response:
    key = bearer_key(request)
    body = await _read_body(request)
    # Read in a thread of its own, a short one would take longer; a long one would hold up others' streams.
    if len(body) <= _MAX_SHORT_BYTES:
        name = _model_name(body)
    else:
        # Nobody without a key makes work of this size.
        await get_scope_apart(request, parts)
        name = await run_in_threadpool(_model_name, body)
    target = await parts.resolver.resolve(Call(key, name))
    return _PassedOn(parts.backend, path, body, target)


@router.post("/chat/completions")
async def create_chat_completion(request: Request, parts: PartsDep) -> Response:
    """Answer a chat, streamed or whole, with a base or a tuned model."""
    return await _answer(request, parts, "/v1/chat/completions")


@router.post("/completions")
async def create_completion(request: Request, parts: PartsDep) -> Response:
    """Continue a text, streamed or whole, with a base or a tuned model."""
    return await _answer(request, parts, "/v1/completions")


@router.post("/responses")
async def create_response(request: Request, parts: PartsDep) -> Response:
    """Answer an input, streamed or whole, with a base or a tuned model; nothing is kept."""
    return await _answer(request, parts, RESPONSES_PATH)
