"""Aliases: names of a project's own that are pointed to models, and back."""

from contextlib import suppress
from typing import Annotated

from fastapi import APIRouter, Query, Request
from starlette.concurrency import run_in_threadpool

from api.alias_check import prove
from api.auth import DetachedPrincipalDep, PrincipalDep
from api.deps import AppState, AppStateDep, SessionDep
from api.schemas.aliases import (
    AliasObject,
    AliasVersionObject,
    PutAliasBody,
    RollBackAliasBody,
    alias_object,
    alias_version_object,
)
from api.schemas.base import DeletedObject, ListPage, list_object
from luthier.core.errors import ModelNotAvailableError, ModelNotFoundError, UnavailableError
from luthier.core.inference import ModelTarget
from services.accounts.auth import Principal
from services.models import aliases, models
from services.models.aliases import WayBack

router = APIRouter(prefix="/v1/aliases", tags=["aliases"])

# How often a rollback is begun anew because somebody else pointed the alias elsewhere.
_MOST_ROLLBACKS = 5

Limit = Annotated[int, Query(ge=0, le=100)]


@router.get("")
def list_aliases(
    session: SessionDep, principal: PrincipalDep, after: str | None = None, limit: Limit = 20
) -> ListPage[AliasObject]:
    """List the project's aliases, newest first."""
    rows, has_more = aliases.list_(session, principal, after=after, limit=limit)
    return list_object([alias_object(row) for row in rows], has_more=has_more, with_ids=True)


@router.get("/{name}/versions")
def list_alias_versions(
    name: str, session: SessionDep, principal: PrincipalDep, after: str | None = None, limit: Limit = 20
) -> ListPage[AliasVersionObject]:
    """List what an alias has pointed to, newest first."""
    rows, has_more = aliases.list_versions(session, principal, name, after=after, limit=limit)
    return list_object([alias_version_object(row) for row in rows], has_more=has_more, with_ids=True)


@router.post("/{name}/rollback")
async def roll_back_alias(
    name: str,
    request: Request,
    principal: DetachedPrincipalDep,
    state: AppStateDep,
    body: RollBackAliasBody | None = None,
) -> AliasObject:
    """Point an alias to what it pointed to before, or to what a version did; the next request sees it.

    The model is loaded and proved first, as a PUT does; `proved` says whether a server has answered with it.
    """
    number = None if body is None else body.version
    for _ in range(_MOST_ROLLBACKS):
        way = await run_in_threadpool(_find_way_back, state, principal, name, number)
        target = None if way.model is None else await run_in_threadpool(_target, state, principal, way.model)
        is_proved = None if target is None else await prove(state.backend, target, param="version")
        await _check_client(request)
        # Where it was pointed elsewhere meanwhile, what was proved may not be what is before it now.
        alias = await run_in_threadpool(_roll_back, state, principal, name, way)
        if alias is not None:
            return {**alias, "proved": is_proved}
    raise UnavailableError(f"{name} is pointed elsewhere again and again; try once more.")


@router.get("/{name}")
def retrieve_alias(name: str, session: SessionDep, principal: PrincipalDep) -> AliasObject:
    """Describe one alias."""
    return alias_object(aliases.get(session, principal, name))


@router.put("/{name}")
async def put_alias(
    name: str, body: PutAliasBody, request: Request, principal: DetachedPrincipalDep, state: AppStateDep
) -> AliasObject:
    """Point an alias to a model, made now when it is new; the next request sees it.

    The model is loaded and proved first, so that no request waits for it, or meets one that can't answer;
    `proved` says whether a server has answered with it.
    """
    seen = await run_in_threadpool(_see, state, principal, name)
    target = await run_in_threadpool(_target, state, principal, body.model)
    is_proved = None if target is None else await prove(state.backend, target)
    await _check_client(request)
    alias = await run_in_threadpool(_put, state, principal, name, body.model, seen)
    return {**alias, "proved": is_proved}


def _find_way_back(state: AppState, principal: Principal, name: str, number: int | None) -> WayBack:
    with state.database.transaction() as session:
        return aliases.find_way_back(session, principal, state.catalogue, name, number)


def _roll_back(state: AppState, principal: Principal, name: str, way: WayBack) -> AliasObject | None:
    with state.database.transaction() as session:
        pointing = aliases.roll_back(session, principal, state.catalogue, name, way)
        return None if pointing is None else alias_object(pointing)


def _target(state: AppState, principal: Principal, model: str) -> ModelTarget | None:
    """Return what a name resolves to; None where pointing to it will say why it does not."""
    with state.database.transaction() as session, suppress(ModelNotFoundError, ModelNotAvailableError):
        return models.resolve(session, principal, state.catalogue, model)
    return None


async def _check_client(request: Request) -> None:
    """Let nothing be changed for a client that has left while it waited: it takes that for failed."""
    if await request.is_disconnected():
        raise UnavailableError("The client has left; the alias points where it did.")


def _see(state: AppState, principal: Principal, name: str) -> aliases.Seen:
    with state.database.transaction() as session:
        return aliases.see(session, principal, name)


def _put(state: AppState, principal: Principal, name: str, model: str, seen: aliases.Seen) -> AliasObject:
    with state.database.transaction() as session:
        return alias_object(aliases.put(session, principal, state.catalogue, name, model, seen=seen))


@router.delete("/{name}")
def delete_alias(name: str, session: SessionDep, principal: PrincipalDep) -> DeletedObject:
    """Forget an alias; the model that it points to stays."""
    alias = aliases.delete(session, principal, name)
    return {"id": alias.id, "object": "alias", "name": alias.name, "deleted": True}
