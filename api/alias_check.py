"""Checks before an alias is pointed to a model: an inference server loads the model and answers with it."""

import asyncio
import json
from contextlib import suppress

from api.deps import AppState, run_in_transaction
from luthier.core.errors import (
    ArtifactCorruptError,
    LuthierError,
    ModelNotAvailableError,
    ModelNotFoundError,
    OutOfMemoryError,
    SelfCheckError,
    UnavailableError,
)
from luthier.core.inference import ModelTarget
from luthier.serving.base import Backend
from services.accounts.auth import Principal
from services.models import names

# Errors about the model itself; any other, such as of a busy server, decides nothing.
_FATAL = {error.code for error in (ArtifactCorruptError, SelfCheckError, OutOfMemoryError)}
_BUSY_STATUS = 503
# Covers loading; shorter than common timeouts of clients.
_SECONDS = 45.0
# A request that every backend answers.
_BODY = {"prompt": "a", "max_tokens": 1}


async def check_target(state: AppState, principal: Principal, model: str, param: str) -> bool | None:
    """Have a model loaded by the inference server that serves it, and answer once.

    Returns:
        Whether a server answered in time: one that is unreachable, busy or faulty does not. None for a base,
        and for a name that does not resolve, which pointing the alias will refuse.

    Raises:
        ModelNotAvailableError: when the server can't serve the model; holds the server's reason.
    """
    try:
        target = await run_in_transaction(state, names.resolve, principal, state.catalogue, model)
    except (ModelNotFoundError, ModelNotAvailableError):
        return None
    if target.artifact is None:
        return None
    try:
        async with asyncio.timeout(_SECONDS):
            return await _answers(state.backend, target, param)
    except TimeoutError:
        return False


async def _answers(backend: Backend, target: ModelTarget, param: str) -> bool:
    body = json.dumps(_BODY | {"model": target.model}).encode()
    try:
        reply = await backend.complete("/v1/completions", body, target)
    except UnavailableError:
        return False
    except LuthierError as error:
        if error.retryable and not isinstance(error, ArtifactCorruptError):
            return False
        raise _refusal(target, error.message, param) from error
    if reply.status < 400:
        return True
    with suppress(ValueError, KeyError, TypeError):
        error_object = json.loads(reply.content)["error"]
        is_temporary = reply.status == _BUSY_STATUS and error_object["code"] == OutOfMemoryError.code
        if error_object["code"] in _FATAL and not is_temporary:
            raise _refusal(target, str(error_object["message"]), param)
    return False


def _refusal(target: ModelTarget, reason: str, param: str) -> ModelNotAvailableError:
    return ModelNotAvailableError(
        f"{target.model} can't be served, so the alias points where it did: {reason}", param=param
    )
