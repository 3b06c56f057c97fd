"""Requests to models: reads key, body and model name within limits, and resolves the name to a target."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import msgspec
from fastapi import Request
from starlette.concurrency import run_in_threadpool

from api.auth import authenticate, bearer_key, look_up
from api.concurrency import MAX_UNCOUNTED_BYTES
from api.deps import AppState
from luthier.core.errors import (
    InvalidRequestError,
    InvalidTypeError,
    LuthierError,
    MissingParameterError,
    TooLargeError,
)
from luthier.core.ids import is_well_formed
from luthier.core.inference import ModelTarget
from luthier.core.settings import MIB
from services.accounts import keys
from services.models import models
from services.models.names import unknown_model

_MAX_BODY_BYTES = 8 * MIB
# Parsed on the event loop; larger bodies would delay its streams.
_MAX_INLINE_BYTES = 64 * 1024
# Names of models are shorter.
_MAX_NAME_CHARACTERS = 1024


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
    return name if len(name) <= _MAX_NAME_CHARACTERS else unknown_model(name)


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
            return models.resolve(session, caller, state.catalogue, name)

    return await look_up(state, read)
