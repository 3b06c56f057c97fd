"""Checkpoint permissions: sharing a model with other projects of the organization.

A name in these paths may hold `:`, and `/` where a client escaped it: the server has decoded it by then.
"""

from typing import Annotated, Literal

from fastapi import APIRouter, Query

from api.deps import PrincipalDep, SessionDep
from api.schemas.base import DeletedObject, ListPage, list_object
from api.schemas.models import CreatePermissionsBody, PermissionObject
from services.models import permissions

router = APIRouter(prefix="/v1/fine_tuning/checkpoints", tags=["fine_tuning"])

_PATH = "/{fine_tuned_model_checkpoint:path}/permissions"
Limit = Annotated[int, Query(ge=0, le=100)]


@router.post(_PATH)
def create_permissions(
    fine_tuned_model_checkpoint: str,
    body: CreatePermissionsBody,
    session: SessionDep,
    principal: PrincipalDep,
) -> ListPage[PermissionObject]:
    """Let projects call a model; one that may already keeps its permission."""
    rows = permissions.create(session, principal, fine_tuned_model_checkpoint, body.project_ids)
    return list_object([PermissionObject.of(row) for row in rows], has_more=False, with_ids=True)


@router.get(_PATH)
def list_permissions(
    fine_tuned_model_checkpoint: str,
    session: SessionDep,
    principal: PrincipalDep,
    after: str | None = None,
    limit: Limit = 10,
    order: Literal["ascending", "descending"] = "descending",
    project_id: str | None = None,
) -> ListPage[PermissionObject]:
    """List who may call a model, newest first by default."""
    rows, has_more = permissions.list_(
        session,
        principal,
        fine_tuned_model_checkpoint,
        after=after,
        limit=limit,
        is_ascending=order == "ascending",
        project_id=project_id,
    )
    return list_object([PermissionObject.of(row) for row in rows], has_more=has_more, with_ids=True)


@router.delete(_PATH + "/{permission_id}")
def delete_permission(
    fine_tuned_model_checkpoint: str, permission_id: str, session: SessionDep, principal: PrincipalDep
) -> DeletedObject:
    """Revoke a permission."""
    permissions.delete(session, principal, fine_tuned_model_checkpoint, permission_id)
    return {"id": permission_id, "object": "checkpoint.permission", "deleted": True}
