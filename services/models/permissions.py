"""Checkpoint permissions: another project of the organization may call a model, and nothing more.

What a permission opens is in services/models/names.py: is_callable.
"""

from collections.abc import Sequence

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from db.queries import find_owned, page
from db.tables import CheckpointPermission, Model, Project
from luthier.core.errors import InvalidValueError, NotFoundError
from luthier.core.ids import new_id
from services.accounts.auth import Principal
from services.models import models, names


def create(
    session: Session, principal: Principal, model_name: str, project_ids: Sequence[str]
) -> list[CheckpointPermission]:
    """Let projects of the organization call a model; returns one permission a project, new or existing."""
    # Twins of one request pass one after the other, and the second finds the first's. Who deletes the model
    # ends its permissions: none is granted while that is under way.
    model = _get_model(session, principal, model_name, for_update=True)
    for index, project_id in enumerate(project_ids):
        _check_project(session, principal, project_id, f"project_ids.{index}")
    return [_grant(session, principal, model, project_id) for project_id in dict.fromkeys(project_ids)]


def _get_model(session: Session, principal: Principal, name: str, *, for_update: bool = False) -> Model:
    model = models.find(session, principal, name, for_update=for_update)
    if model is None:
        raise names.unknown_model(name)
    return model


def _check_project(session: Session, principal: Principal, project_id: str, param: str) -> None:
    if project_id == principal.project_id:
        raise InvalidValueError(
            f"{param}: this project owns the model, so it needs no permission.", param=param
        )
    known = session.scalar(
        select(Project.id).where(
            Project.id == project_id,
            Project.organization_id == principal.organization_id,
            Project.deleted_at.is_(None),
        )
    )
    if known is None:
        raise InvalidValueError(
            f"{param}: no such project in this organization: {project_id[:64]}", param=param
        )


def _grant(session: Session, principal: Principal, model: Model, project_id: str) -> CheckpointPermission:
    there = session.scalar(
        select(CheckpointPermission).where(
            CheckpointPermission.model_id == model.id,
            CheckpointPermission.grantee_project_id == project_id,
            CheckpointPermission.deleted_at.is_(None),
        )
    )
    if there is not None:
        return there
    permission = CheckpointPermission(
        id=new_id("permission"), **principal.owner_columns(), model_id=model.id, grantee_project_id=project_id
    )
    session.add(permission)
    session.flush()
    return permission


def list_(
    session: Session,
    principal: Principal,
    model_name: str,
    *,
    after: str | None,
    limit: int,
    is_ascending: bool,
    project_id: str | None,
) -> tuple[Sequence[CheckpointPermission], bool]:
    """Return a page of a model's permissions, and whether more follow."""
    model = _get_model(session, principal, model_name)
    is_listed = CheckpointPermission.model_id == model.id
    filters = [] if project_id is None else [CheckpointPermission.grantee_project_id == project_id]
    return page(
        session,
        CheckpointPermission,
        is_listed,
        *filters,
        after=after,
        limit=limit,
        is_ascending=is_ascending,
    )


def delete(session: Session, principal: Principal, model_name: str, permission_id: str) -> None:
    """Take a permission back; the project's next request finds no such model."""
    model = _get_model(session, principal, model_name)
    permission = find_owned(
        session, CheckpointPermission, principal.project_id, permission_id, for_update=True
    )
    if permission is None or permission.model_id != model.id:
        raise NotFoundError(f"No such permission: {permission_id[:64]}", param="permission_id")
    permission.deleted_at = func.now()
