"""API keys: stored as a hash, found by it, revoked at once."""

from collections.abc import Sequence
from datetime import timedelta

from sqlalchemy import bindparam, func, or_, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from db.tables import ApiKey, Organization, Project
from luthier.core.errors import (
    InvalidRequestError,
    NotFoundError,
    PermissionDeniedError,
    UnauthenticatedError,
)
from luthier.core.ids import hash_api_key, is_well_formed, key_prefix, new_api_key, new_id
from services.accounts.auth import Principal

# Once a minute is enough to say when a key was last used, and spares a write per request.
_LAST_USED_RESOLUTION = timedelta(minutes=1)
_IS_DUE = or_(ApiKey.last_used_at.is_(None), ApiKey.last_used_at < func.now() - _LAST_USED_RESOLUTION)
# Built once: that takes longer than it runs, and every request does so.
_FIND = (
    select(
        ApiKey.organization_id,
        Organization.slug,
        ApiKey.project_id,
        ApiKey.id,
        ApiKey.is_admin,
        _IS_DUE,
    )
    .join(Organization, Organization.id == ApiKey.organization_id)
    .where(ApiKey.key_hash == bindparam("key_hash"), ApiKey.deleted_at.is_(None))
)
# A locked row is skipped: another request is writing it, or a long transaction holds it.
_NOTE_USE = (
    update(ApiKey)
    .where(
        ApiKey.id.in_(
            select(ApiKey.id)
            .where(ApiKey.id == bindparam("key_id"), _IS_DUE)
            .with_for_update(skip_locked=True)
        )
    )
    .values(last_used_at=func.now())
)


def authenticate(session: Session, key: str) -> Principal:
    """Return the principal of a key in plain text; raises UnauthenticatedError for an unknown one."""
    row = (
        session.execute(_FIND, {"key_hash": hash_api_key(key)}).one_or_none() if is_well_formed(key) else None
    )
    if row is None:
        raise unknown_key()
    organization_id, slug, project_id, key_id, is_admin, is_due = row
    if is_due:
        session.execute(_NOTE_USE, {"key_id": key_id})
    return Principal(organization_id, slug, project_id, key_id, is_admin)


def check_still_valid(session: Session, principal: Principal) -> None:
    """Refuse a caller whose key was revoked since it was looked up."""
    valid = select(ApiKey.id).where(ApiKey.id == principal.key_id, ApiKey.deleted_at.is_(None))
    if session.scalar(valid) is None:
        raise unknown_key()


def unknown_key() -> UnauthenticatedError:
    """Return the error for a key that opens nothing."""
    return UnauthenticatedError("Incorrect API key provided. Make one with `luthier keys create`.")


def _require_admin(principal: Principal) -> None:
    if not principal.is_admin:
        raise PermissionDeniedError("This key can't manage keys; use the admin key of the installation.")


def create(
    session: Session, principal: Principal, *, name: str, project_name: str | None, is_admin: bool = False
) -> tuple[ApiKey, str, str]:
    """Make a key for a project, by default the caller's own; an unknown project is made. Admins only."""
    _require_admin(principal)
    if project_name is None:
        project = session.get_one(Project, principal.project_id)
    else:
        project = ensure_project(session, principal.organization_id, project_name)
    key = new_api_key()
    row = insert_key(session, project, key, name=name, is_admin=is_admin, maker_id=principal.key_id)
    return row, project.name, key


def insert_key(
    session: Session, project: Project, key: str, *, name: str, is_admin: bool, maker_id: str | None = None
) -> ApiKey:
    """Store the hash of a key that opens a project, made by the key with the id `maker_id`."""
    row = ApiKey(
        id=new_id("api_key"),
        organization_id=project.organization_id,
        project_id=project.id,
        created_by_key_id=maker_id,
        name=name,
        prefix=key_prefix(key),
        key_hash=hash_api_key(key),
        is_admin=is_admin,
    )
    session.add(row)
    session.flush()
    return row


def ensure_project(session: Session, organization_id: str, name: str) -> Project:
    """Return the organization's project of that name, made now when there is none."""
    # Of two who ask at once, the second waits for the first and then finds the same.
    session.execute(
        insert(Project)
        .values(id=new_id("project"), organization_id=organization_id, name=name)
        .on_conflict_do_nothing(index_elements=["organization_id", "name"])
    )
    return session.scalars(
        select(Project).where(Project.organization_id == organization_id, Project.name == name)
    ).one()


def list_(session: Session, principal: Principal) -> Sequence[tuple[ApiKey, str]]:
    """List the organization's keys, newest first, each with its project's name. Admins only."""
    _require_admin(principal)
    found = session.execute(
        select(ApiKey, Project.name)
        .join(Project, Project.id == ApiKey.project_id)
        .where(ApiKey.organization_id == principal.organization_id, ApiKey.deleted_at.is_(None))
        .order_by(ApiKey.created_at.desc())
    )
    return [(key, project_name) for key, project_name in found]


def revoke(session: Session, principal: Principal, key_id: str) -> None:
    """Make a key useless from the next request on. Admins only; a key can't revoke itself."""
    _require_admin(principal)
    if key_id == principal.key_id:
        raise InvalidRequestError("A key can't revoke itself; use another admin key.", param="id")
    revoked = session.execute(
        update(ApiKey)
        .where(
            ApiKey.id == key_id,
            ApiKey.organization_id == principal.organization_id,
            ApiKey.deleted_at.is_(None),
        )
        .values(deleted_at=func.now())
        .returning(ApiKey.id)
    ).one_or_none()
    if revoked is None:
        raise NotFoundError(f"No such API key: {key_id[:64]}", param="id")
