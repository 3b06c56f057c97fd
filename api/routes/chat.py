"""Chat completions, completions and responses.

Reads key, body and model name within limits, resolves the name to a target, and relays the answer of an
inference server, which reads all other fields.
"""

import json
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from fastapi.responses import Response
from starlette.concurrency import run_in_threadpool

from api.concurrency import MAX_UNCOUNTED_BYTES
from api.deps import AppState, AppStateDep, authenticate, bearer_key, look_up
from api.schemas.answers import EVENT_STREAM, ChatCompletion, Completion, ResponseObject
from luthier.core.errors import (
    InvalidRequestError,
    InvalidTypeError,
    LuthierError,
    MissingParameterError,
    TooLargeError,
    UnavailableError,
)
from luthier.core.ids import is_well_formed
from luthier.core.inference import (
    HEADER_MODEL,
    HEADER_USAGE,
    USAGE_EVENT,
    ModelTarget,
    TokenCounts,
    TokenUsage,
)
from luthier.core.settings import MIB
from luthier.inference.server.sse import EventStream, while_connected
from luthier.serving.base import Backend
from services.accounts import keys
from services.models import names

router = APIRouter(prefix="/v1", tags=["inference"])

RESPONSES_PATH = "/v1/responses"
_MAX_BODY_BYTES = 8 * MIB
# Parsed on the event loop; larger bodies would delay its streams.
_MAX_INLINE_BYTES = 64 * 1024
# Names of models are shorter.
_MAX_NAME_CHARACTERS = 1024
_END_OF_EVENT = b"\n\n"
_USAGE = _END_OF_EVENT + USAGE_EVENT
_NUMBER = re.compile(rb'"sequence_number":(\d+)')


def _documented_as(model: Any) -> dict[int | str, dict[str, Any]]:
    return {200: {"model": model, "content": EVENT_STREAM}}


async def _answer(request: Request, state: AppState, path: str) -> Response:
    async with read_body(request, state) as body:
        target = await resolve_target(request, state, await read_model_name(body))
        usage = TokenCounts()
        request.state.model, request.state.usage = target.model, usage
        return await ask(request, state.backend, path, body, target, usage)


@router.post("/chat/completions", responses=_documented_as(ChatCompletion))
async def create_chat_completion(request: Request, state: AppStateDep) -> Response:
    """Answer a chat, streamed or whole, with a base or a tuned model."""
    return await _answer(request, state, "/v1/chat/completions")


@router.post("/completions", responses=_documented_as(Completion))
async def create_completion(request: Request, state: AppStateDep) -> Response:
    """Continue a text, streamed or whole, with a base or a tuned model."""
    return await _answer(request, state, "/v1/completions")


@router.post("/responses", responses=_documented_as(ResponseObject))
async def create_response(request: Request, state: AppStateDep) -> Response:
    """Answer an input, streamed or whole, with a base or a tuned model; nothing is kept."""
    return await _answer(request, state, RESPONSES_PATH)


@asynccontextmanager
async def read_body(request: Request, state: AppState) -> AsyncIterator[bytes]:
    """Yield a request's body, which counts against the budget of bodies until the block ends.

    Raises:
        UnauthenticatedError: when the key is missing or malformed, or unknown where the body is large.
        TooLargeError: when the body is larger than its limit.
        TooManyRequestsError: when the project's bodies pass their share of the memory for bodies.
        UnavailableError: when all bodies pass it.
    """
    if not is_well_formed(bearer_key(request)):
        raise keys.unknown_key()
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) <= MAX_UNCOUNTED_BYTES:
        yield await _read(request, lambda _: None)
        return
    caller = await authenticate(request, state)
    if declared.isdecimal() and int(declared) > _MAX_BODY_BYTES:
        raise _too_large()
    with state.bodies.hold(caller.project_id) as count:
        yield await _read(request, count)


async def _read(request: Request, count: Callable[[int], None]) -> bytes:
    chunks, num_bytes = [], 0
    async for chunk in request.stream():
        num_bytes += len(chunk)
        if num_bytes > _MAX_BODY_BYTES:
            raise _too_large()
        count(len(chunk))
        chunks.append(chunk)
    return b"".join(chunks)


def _too_large() -> TooLargeError:
    return TooLargeError(f"The request is larger than {_MAX_BODY_BYTES} bytes.", param="messages")


class _Named(msgspec.Struct):
    """The one field that the API reads; the inference server reads the others."""

    model: str | None = None


async def read_model_name(body: bytes) -> str | LuthierError:
    """Return the model name of a body, or the error to raise once the key has been checked."""
    if len(body) <= _MAX_INLINE_BYTES:
        return _model_name(body)
    return await run_in_threadpool(_model_name, body)


def _model_name(body: bytes) -> str | LuthierError:
    try:
        name = msgspec.json.decode(body, type=_Named).model
    except msgspec.ValidationError as error:
        if str(error).endswith("`$.model`"):
            return InvalidTypeError("Invalid type for 'model': expected a string.", param="model")
        return InvalidTypeError("The body must be a JSON object.")
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return InvalidRequestError("The body is no valid JSON; send a JSON object.")
    if name is None:
        return MissingParameterError("Missing required parameter: 'model'.", param="model")
    return name if len(name) <= _MAX_NAME_CHARACTERS else names.unknown_model(name)


async def resolve_target(request: Request, state: AppState, name: str | LuthierError) -> ModelTarget:
    """Authenticate a request and resolve its model name, by one transaction.

    Args:
        name: the model name, or the error that is raised instead once the key has been checked.

    Raises:
        UnauthenticatedError: when the key is missing, malformed, unknown or revoked.
        ModelNotFoundError: when the caller's project has no such model.
        UnavailableError: when the database can't be reached, or does not answer in time.
    """
    key = bearer_key(request)

    def read() -> ModelTarget:
        with state.database.transaction() as session:
            request.state.principal = caller = keys.authenticate(session, key)
            if isinstance(name, LuthierError):
                raise name
            return names.resolve(session, caller, state.catalogue, name)

    return await look_up(state, read)


async def ask(
    request: Request, backend: Backend, path: str, body: bytes, target: ModelTarget, usage: TokenCounts
) -> Response:
    """Return an inference server's answer, which stops when the client disconnects.

    Args:
        path: of the endpoint.
        target: what the body's model name resolves to.
        usage: set as the answer's usage becomes known.

    Raises:
        LuthierError: when no server could be reached, or it failed before its answer began.
    """
    reply = await while_connected(request, backend.complete(path, body, target))
    headers = dict(reply.headers)
    headers[HEADER_MODEL] = target.resolved_model or target.model
    used = headers.pop(HEADER_USAGE, None)
    if used is not None:
        _set(usage, TokenUsage.from_text(used))
    if reply.events is None:
        return Response(reply.content, reply.status, headers)
    usage.num_requests = 1
    return EventStream(_relay(path, reply.events, usage), reply.aclose, headers)


def _set(usage: TokenCounts, used: TokenUsage) -> None:
    usage.num_requests = 1
    usage.input_tokens, usage.input_cached_tokens, usage.output_tokens = used


def _take_usage(events: bytes, usage: TokenCounts) -> bytes:
    """Return the events without the usage event, which sets `usage`."""
    before, _, rest = (_END_OF_EVENT + events).partition(_USAGE)
    text, _, after = rest.partition(_END_OF_EVENT)
    _set(usage, TokenUsage.from_text(text.decode()))
    return (before + _END_OF_EVENT + after).removeprefix(_END_OF_EVENT)


async def _relay(path: str, pieces: AsyncIterator[bytes], usage: TokenCounts) -> AsyncIterator[bytes]:
    """Yield whole events; a stream that is interrupted ends with an error event in its endpoint's shape.

    Until the usage event, each event counts as a token, so that clients that disconnect are counted, too.
    """
    rest = first = last = b""
    is_reported = False
    try:
        async for piece in pieces:
            events, end, rest = (rest + piece).rpartition(_END_OF_EVENT)
            if end:
                last = events + end
                if _USAGE in last or last.startswith(USAGE_EVENT):
                    last, is_reported = _take_usage(last, usage), True
                elif not is_reported:
                    usage.output_tokens += last.count(_END_OF_EVENT)
                first = first or last
                yield last
    except UnavailableError as error:
        yield _failed_response(error, first, last) if path == RESPONSES_PATH else _failed_chunk(error)


def _failed_chunk(error: LuthierError) -> bytes:
    """Return the event by which SDKs recognise an error."""
    return f"data: {json.dumps(error.to_body())}\n\n".encode()


def _failed_response(error: LuthierError, first: bytes, last: bytes) -> bytes:
    """Return `error` and `response.failed`, numbered after the events that were sent.

    Args:
        first: the events that were sent first, with the response as it began.
        last: the events that were sent last.
    """
    numbers = _NUMBER.findall(last)
    number = int(numbers[-1]) + 1 if numbers else 0
    events = _event("error", number, {"code": error.code, "message": error.message, "param": error.param})
    response = _response_of(first)
    if response is not None:
        failure = {"code": "server_error", "message": error.message}
        failed = {"response": response | {"status": "failed", "error": failure}}
        events += _event("response.failed", number + 1, failed)
    return events


def _event(kind: str, number: int, fields: dict[str, Any]) -> bytes:
    content = {"type": kind, "sequence_number": number} | fields
    return f"event: {kind}\ndata: {json.dumps(content)}\n\n".encode()


def _response_of(events: bytes) -> dict[str, Any] | None:
    """Return the response in a stream's first event, or None without one."""
    for line in events.split(b"\n"):
        if line.startswith(b"data: "):
            try:
                found = json.loads(line.removeprefix(b"data: "))["response"]
            except (ValueError, KeyError, TypeError):
                return None
            return found if isinstance(found, dict) else None
    return None
