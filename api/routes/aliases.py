"""Aliases: a project's own names for models. An inference server answers with a model before it gets one."""

import asyncio
import json
from contextlib import suppress
from typing import Annotated

from fastapi import APIRouter, Query, Request

from api.deps import (
    AppState,
    AppStateDep,
    DetachedPrincipalDep,
    PrincipalDep,
    SessionDep,
    run_in_transaction,
)
from api.schemas.aliases import (
    AliasObject,
    AliasVersionObject,
    PointedAliasObject,
    PutAliasBody,
    RollBackAliasBody,
)
from api.schemas.base import DeletedObject, ListPage, list_object
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
from services.models import aliases, names

router = APIRouter(prefix="/v1/aliases", tags=["aliases"])

# Attempts of a rollback while other requests move the alias.
_MAX_ATTEMPTS = 5
# Errors about the model itself; any other, such as of a busy server, decides nothing.
_FATAL = {error.code for error in (ArtifactCorruptError, SelfCheckError, OutOfMemoryError)}
_BUSY_STATUS = 503
# Covers loading; shorter than common timeouts of clients.
_SECONDS = 45.0
# A request that every backend answers.
_BODY = {"prompt": "a", "max_tokens": 1}

Limit = Annotated[int, Query(ge=0, le=100)]


@router.get("")
def list_aliases(
    session: SessionDep, principal: PrincipalDep, after: str | None = None, limit: Limit = 20
) -> ListPage[AliasObject]:
    """List the project's aliases, newest first."""
    rows, has_more = aliases.list_(session, principal, after=after, limit=limit)
    return list_object([AliasObject.of_pointing(row) for row in rows], has_more=has_more, with_ids=True)


@router.get("/{name}/versions")
def list_alias_versions(
    name: str, session: SessionDep, principal: PrincipalDep, after: str | None = None, limit: Limit = 20
) -> ListPage[AliasVersionObject]:
    """List what an alias has pointed to, newest first."""
    rows, has_more = aliases.list_versions(session, principal, name, after=after, limit=limit)
    data = [AliasVersionObject.of(version, model=model) for version, model in rows]
    return list_object(data, has_more=has_more, with_ids=True)


@router.post("/{name}/rollback")
async def roll_back_alias(
    name: str,
    request: Request,
    principal: DetachedPrincipalDep,
    state: AppStateDep,
    body: RollBackAliasBody | None = None,
) -> PointedAliasObject:
    """Point an alias to what it pointed to before, or to what a version did; the next request sees it.

    The model is loaded and proved first, as a PUT does; `proved` says whether a server has answered with it.
    """
    number = None if body is None else body.version
    for _ in range(_MAX_ATTEMPTS):
        way = await run_in_transaction(state, aliases.find_way_back, principal, state.catalogue, name, number)
        is_proved = None if way.model is None else await _check_target(state, principal, way.model, "version")
        await _check_connected(request)

        # None: the alias was moved meanwhile, so the model before it may be another one.
        pointing = await run_in_transaction(state, aliases.roll_back, principal, state.catalogue, name, way)
        if pointing is not None:
            return PointedAliasObject.of_pointing(pointing, proved=is_proved)
    raise UnavailableError(f"{name} is pointed elsewhere again and again; try once more.")


@router.get("/{name}")
def retrieve_alias(name: str, session: SessionDep, principal: PrincipalDep) -> AliasObject:
    """Describe one alias."""
    return AliasObject.of_pointing(aliases.get(session, principal, name))


@router.put("/{name}")
async def put_alias(
    name: str, body: PutAliasBody, request: Request, principal: DetachedPrincipalDep, state: AppStateDep
) -> PointedAliasObject:
    """Point an alias to a model, made now when it is new; the next request sees it.

    The model is loaded and proved first, so that no request waits for it, or meets one that can't answer;
    `proved` says whether a server has answered with it.
    """
    seen = await run_in_transaction(state, aliases.see, principal, name)
    is_proved = await _check_target(state, principal, body.model, "model")
    await _check_connected(request)
    pointing = await run_in_transaction(
        state, aliases.put, principal, state.catalogue, name, body.model, seen=seen
    )
    return PointedAliasObject.of_pointing(pointing, proved=is_proved)


async def _check_connected(request: Request) -> None:
    """Change nothing for a client that disconnected while it waited: it takes the request for failed."""
    if await request.is_disconnected():
        raise UnavailableError("The client has left; the alias points where it did.")


@router.delete("/{name}")
def delete_alias(name: str, session: SessionDep, principal: PrincipalDep) -> DeletedObject:
    """Delete an alias; the model that it points to stays."""
    alias = aliases.delete(session, principal, name)
    return {"id": alias.id, "object": "alias", "name": alias.name, "deleted": True}


async def _check_target(state: AppState, principal: Principal, model: str, param: str) -> bool | None:
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
