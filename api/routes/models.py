"""Models: bases, tuned models and checkpoints, and the files of a tuned one."""

from contextlib import suppress

from fastapi import APIRouter, Request
from fastapi.responses import Response
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from api.deps import AppState, AppStateDep, DetachedPrincipalDep, PrincipalDep, SessionDep, run_in_transaction
from api.schemas.base import DeletedObject, ListPage, list_object
from api.schemas.models import ModelFileObject, ModelFilesPage, ModelObject
from api.streaming.byte_ranges import BYTES_ANSWER, stored_bytes
from luthier.core.errors import NotFoundError, UnavailableError
from luthier.storage.manifests import Manifest
from services.accounts import limits
from services.accounts.auth import Principal
from services.models import models, names

router = APIRouter(prefix="/v1/models", tags=["models"])


@router.get("")
def list_models(session: SessionDep, principal: PrincipalDep, state: AppStateDep) -> ListPage[ModelObject]:
    """List every name that can be called: aliases, tuned models, checkpoints, bases, names mapped to them."""
    bases = {base.id: base for base in models.list_bases(session)}
    aliased = names.list_aliased(session, principal, state.catalogue)
    data = [_named_object(named, principal) for named in aliased]
    # The project's own aliases come before the catalogue's.
    shadowed = {model.id for model in data}
    data += [
        ModelObject.of_model(model, principal.organization_slug) for model in models.list_(session, principal)
    ]
    data += [ModelObject.of_base(base) for base in bases.values() if base.id in state.catalogue.bases]
    data += [
        ModelObject.of_base(bases[target]).model_copy(update={"id": alias, "base_model": target})
        for alias, target in state.catalogue.aliases.items()
        if target in bases and alias not in shadowed
    ]
    return list_object(data, has_more=False)


def _named_object(named: names.Named, principal: Principal) -> ModelObject:
    if named.model is not None:
        described = ModelObject.of_model(named.model, principal.organization_slug)
    else:
        assert named.base is not None
        described = ModelObject.of_base(named.base)
    return described if named.alias is None else described.as_alias(named.alias, principal.organization_slug)


async def _find_artifact(state: AppState, principal: Principal, name: str) -> tuple[str, Manifest]:
    """Return the storage key and the manifest of a tuned model of the project."""
    model = await run_in_transaction(state, models.get_own, principal, state.catalogue, name)
    return model.artifact_key, await run_in_threadpool(state.storage.read_manifest, model.artifact_key)


@router.get("/{model}/files")
async def list_model_files(model: str, state: AppStateDep, principal: DetachedPrincipalDep) -> ModelFilesPage:
    """List the files of a tuned model with their sizes and hashes."""
    _, manifest = await _find_artifact(state, principal, model)
    # Without the manifest itself.
    data = [ModelFileObject.of(entry, name=name) for name, entry in sorted(manifest.files.items())]
    return ModelFilesPage(digest=manifest.digest, data=data)


@router.head("/{model}/files/{name:path}", include_in_schema=False)
@router.get("/{model}/files/{name:path}", response_class=Response, responses=BYTES_ANSWER)
async def download_model_file(
    model: str, name: str, request: Request, state: AppStateDep, principal: DetachedPrincipalDep
) -> Response:
    """Download one file of a tuned model, whole or a range of it."""
    key, manifest = await _find_artifact(state, principal, model)
    entry = manifest.files.get(name)
    if entry is None:
        raise NotFoundError(f"{model} has no file {name[:80]!r}; GET /v1/models/{model}/files lists them.")
    return await stored_bytes(
        request,
        state.storage,
        f"{key}/{name}",
        size_bytes=entry.bytes,
        sha256=entry.sha256,
        filename=name,
    )


@router.put("/{model}/pin")
async def pin_model(model: str, state: AppStateDep, principal: DetachedPrincipalDep) -> ModelObject:
    """Let inference servers keep a tuned model in memory from its next request on."""
    health = await state.backend.health()

    def pin(session: Session) -> ModelObject:
        found = models.set_pinned(session, principal, state.catalogue, model, is_pinned=True)
        limits.check_pinned_bytes(session, found, health.room_bytes, state.settings.max_pinned_share)
        return ModelObject.of_model(found, principal.organization_slug)

    return await run_in_transaction(state, pin)


@router.delete("/{model}/pin")
def unpin_model(model: str, session: SessionDep, principal: PrincipalDep, state: AppStateDep) -> ModelObject:
    """Let a tuned model leave the memory again when others need its room."""
    found = models.set_pinned(session, principal, state.catalogue, model, is_pinned=False)
    return ModelObject.of_model(found, principal.organization_slug)


# A path, and after all other routes: SDKs before version 3 do not encode slashes in names.
@router.get("/{model:path}")
def retrieve_model(
    model: str, session: SessionDep, principal: PrincipalDep, state: AppStateDep
) -> ModelObject:
    """Describe one model."""
    named = names.get_named(session, principal, state.catalogue, model)
    described = _named_object(named, principal)
    if named.base is not None and described.id != model:
        return described.model_copy(update={"id": model, "base_model": named.base.id})
    return described


@router.delete("/{model:path}")
async def delete_model(model: str, state: AppStateDep, principal: DetachedPrincipalDep) -> DeletedObject:
    """Delete a tuned model or checkpoint, its bytes included."""
    deleted = await run_in_transaction(state, models.delete, principal, state.catalogue, model)
    # Where storage is unavailable, a worker's garbage collection deletes the bytes.
    with suppress(UnavailableError):
        await run_in_threadpool(state.storage.delete_prefix, deleted.artifact_key)
    return {"id": model, "object": "model", "deleted": True}
