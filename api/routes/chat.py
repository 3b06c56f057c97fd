"""Chat and completions: the name is resolved here, the answer is the inference server's."""

import json

import anyio
from fastapi import APIRouter, Request
from fastapi.responses import Response, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send

from api.deps import Parts, PartsDep, bearer_key
from luthier.core.errors import InvalidRequestError, InvalidTypeError, MissingParameterError, TooLargeError
from luthier.core.inference import ModelTarget
from luthier.inference.backends.base import Reply
from services import keys, models

router = APIRouter(prefix="/v1", tags=["inference"])

_MAX_BODY_BYTES = 8 * 1024 * 1024
_PASSED_ON = {"content-type", "retry-after", "x-luthier-digest", "x-should-retry", "cache-control"}


class _PassedOn(StreamingResponse):
    """An upstream's answer on its way to the client; the upstream is told when the client has left."""

    def __init__(self, reply: Reply) -> None:
        headers = {name: value for name, value in reply.headers.items() if name.lower() in _PASSED_ON}
        super().__init__(reply.body, reply.status, headers)
        self._body = reply.body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer, and close the upstream's whatever happens."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            with anyio.CancelScope(shield=True):
                await self._body.aclose()


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


async def _answer(request: Request, parts: Parts, path: str) -> Response:
    key = bearer_key(request)
    body = await _read_body(request)

    def resolve() -> ModelTarget:
        with parts.database.transaction() as session:
            scope = keys.authenticate(session, key)
            return models.resolve(session, scope, parts.catalogue, _model_name(body))

    target = await run_in_threadpool(resolve)
    return _PassedOn(await parts.backend.complete(path, body, target))


@router.post("/chat/completions")
async def create_chat_completion(request: Request, parts: PartsDep) -> Response:
    """Answer a chat, streamed or whole, with a base or a tuned model."""
    return await _answer(request, parts, "/v1/chat/completions")


@router.post("/completions")
async def create_completion(request: Request, parts: PartsDep) -> Response:
    """Continue a text, streamed or whole, with a base or a tuned model."""
    return await _answer(request, parts, "/v1/completions")
