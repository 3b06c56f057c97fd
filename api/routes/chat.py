"""Chat, completions and responses: the name is resolved here, the answer is the inference server's."""

import asyncio
import json

import anyio
from fastapi import APIRouter, Request
from fastapi.responses import Response, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from api.breaking_off import RESPONSES_PATH, StreamEnd
from api.deps import Parts, PartsDep, bearer_key
from api.passing import PieceSender
from api.requests import SEND_PIECE
from luthier.core.errors import (
    InvalidRequestError,
    InvalidTypeError,
    MissingParameterError,
    TooLargeError,
    UnavailableError,
)
from luthier.core.inference import ModelTarget
from luthier.inference.backends.base import Reply
from services import keys, models

router = APIRouter(prefix="/v1", tags=["inference"])

_MAX_BODY_BYTES = 8 * 1024 * 1024


class _PassedOn(StreamingResponse):
    """An upstream's answer on its way to the client; the upstream is told when the client has left."""

    def __init__(self, reply: Reply, path: str) -> None:
        super().__init__(reply.body, reply.status, dict(reply.headers))
        self._body, self._pass_to = reply.body, reply.pass_to
        self._end = StreamEnd(path)
        self._scope: Scope = {}
        self._is_event_stream = reply.headers.get("content-type", "").startswith("text/event-stream")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer, and close the upstream's whatever happens."""
        self._scope = scope
        try:
            await super().__call__(scope, receive, send)
        finally:
            with anyio.CancelScope(shield=True):
                await self._body.aclose()

    async def stream_response(self, send: Send) -> None:
        """Pass the pieces on; a stream that breaks off ends with an error that clients read."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        sender = PieceSender(self._scope.get(SEND_PIECE, send))

        def take(piece: bytes) -> bool:
            is_sent = sender.try_send(piece)
            if is_sent:
                self._end.pass_on(piece)
            return is_sent

        if self._pass_to is not None:
            self._pass_to(take)
        try:
            async for piece in self._body:
                self._end.pass_on(piece)
                await sender.send(piece)
            await sender.drain()
        except UnavailableError as error:
            if not self._is_event_stream:
                raise
            await sender.send(self._end.broken_off(error))
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


def _model_name(body: bytes) -> str:
    try:
        parsed = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError("The body is no valid JSON; send a JSON object.") from error
    if not isinstance(parsed, dict):
        raise InvalidTypeError("The body must be a JSON object.")
    model = parsed.get("model")
    if model is None:
        raise MissingParameterError("Missing required parameter: 'model'.", param="model")
    if not isinstance(model, str):
        raise InvalidTypeError("Invalid type for 'model': expected a string.", param="model")
    return model


async def _has_left(request: Request) -> None:
    """Return once the client has gone; the request's body has been read, so nothing else can come."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _ask(request: Request, parts: Parts, path: str, body: bytes, target: ModelTarget) -> Reply:
    """Ask the inference server, which hears at once when the client no longer waits for the answer."""
    asking = asyncio.ensure_future(parts.backend.complete(path, body, target))
    leaving = asyncio.ensure_future(_has_left(request))
    try:
        await asyncio.wait({asking, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not asking.done():
            raise ClientDisconnect
        return asking.result()
    finally:
        leaving.cancel()
        asking.cancel()
        await asyncio.gather(leaving, asking, return_exceptions=True)


async def _answer(request: Request, parts: Parts, path: str) -> Response:
    key = bearer_key(request)
    body = await _read_body(request)

    def resolve() -> ModelTarget:
        # Nothing here belongs together: the name is resolved by one statement.
        with parts.database.statements() as session:
            scope = keys.authenticate(session, key)
            return models.resolve(session, scope, parts.catalogue, _model_name(body))

    target = await run_in_threadpool(resolve)
    return _PassedOn(await _ask(request, parts, path, body, target), path)


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
