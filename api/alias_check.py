"""Having an inference server load a model and prove it, before a name is pointed to it."""

import asyncio
import contextlib
import json

from luthier.core.errors import (
    ArtifactCorruptError,
    LuthierError,
    ModelNotAvailableError,
    OutOfMemoryError,
    SelfCheckError,
    UnavailableError,
)
from luthier.core.inference import ModelTarget
from luthier.inference.backends.base import Backend

# What says something about the model; anything else (a busy server, one that is away) says nothing.
_FATAL = {error.code for error in (ArtifactCorruptError, SelfCheckError, OutOfMemoryError)}
_BUSY_STATUS = 503
# A server may take as long as that, for what is not in its memory; shorter than clients commonly wait.
_SECONDS = 45.0
# The least that every backend answers.
_BODY = {"prompt": "a", "max_tokens": 1}


async def prove(backend: Backend, target: ModelTarget, *, param: str = "model") -> bool | None:
    """Have a model loaded by the server that will be asked for it. A base has nothing to prove.

    Returns:
        Whether a server has answered with it in time, which one that is away, busy or at fault has not; None
        for a base.

    Raises:
        ModelNotAvailableError: when the server can't serve it, whatever the reason that it gives.
    """
    if target.artifact is None:
        return None
    try:
        async with asyncio.timeout(_SECONDS):
            return await _ask(backend, target, param)
    except TimeoutError:
        return False


async def _ask(backend: Backend, target: ModelTarget, param: str) -> bool:
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
    with contextlib.suppress(ValueError, KeyError, TypeError):
        error_object = json.loads(reply.content)["error"]
        is_for_now = reply.status == _BUSY_STATUS and error_object["code"] == OutOfMemoryError.code
        if error_object["code"] in _FATAL and not is_for_now:
            raise _refusal(target, str(error_object["message"]), param)
    return False


def _refusal(target: ModelTarget, why: str, param: str) -> ModelNotAvailableError:
    return ModelNotAvailableError(
        f"{target.model} can't be served, so the alias points where it did: {why}", param=param
    )
