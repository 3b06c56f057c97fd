"""Chat, completions and responses: the name is resolved here, the answer is the inference server's."""

import json

from fastapi import APIRouter, Request
from fastapi.responses import Response
from starlette.concurrency import run_in_threadpool

from api.chat_proxy import RESPONSES_PATH, ask
from api.deps import Parts, PartsDep, bearer_key
from api.target_resolver import authenticate, resolve_target
from luthier.core.errors import (
    InvalidRequestError,
    InvalidTypeError,
    LuthierError,
    MissingParameterError,
    TooLargeError,
)
from services.usage import TokenCounts

router = APIRouter(prefix="/v1", tags=["inference"])

_MAX_BODY_BYTES = 8 * 1024 * 1024
_MAX_SHORT_BYTES = 16 * 1024


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
    bearer_key(request)
    body = await _read_body(request)
    # Read in a thread of its own, a short one would take longer; a long one would hold up others' streams.
    if len(body) <= _MAX_SHORT_BYTES:
        name = _model_name(body)
    else:
        # Nobody without a key makes work of this size.
        await authenticate(request, parts)
        name = await run_in_threadpool(_model_name, body)
    target = await resolve_target(request, parts, name)
    usage = TokenCounts()
    request.state.model, request.state.usage = target.model, usage
    return await ask(request, parts.backend, path, body, target, usage)


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
