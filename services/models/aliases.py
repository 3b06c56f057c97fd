"""Aliases: a project's own names for models, with their versions and rollbacks.

Resolution of a request's name is in services/models/names.py: look_up.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sqlalchemy import Select, func, select
from sqlalchemy.orm import Session

from db.queries import find_alias, find_cursor, lock_key, page
from db.tables import Alias, AliasVersion, Base, Model
from luthier.bases.catalogue import Catalogue
from luthier.core.errors import InvalidValueError, ModelNotAvailableError, NotFoundError
from luthier.core.ids import new_id
from services.accounts.auth import Principal
from services.models import models, names

_MAX_NAME_LENGTH = 128
_PIECE = "[A-Za-z0-9][A-Za-z0-9._-]*"
_NAME = re.compile(f"{_PIECE}(?:[/:]{_PIECE})*")


@dataclass(frozen=True)
class Pointing:
    """An alias, and name and digest of what it points to; no digest where a base is no longer here."""

    alias: Alias
    model: str
    digest: str | None


class Target(NamedTuple):
    """What an alias can point to: a model or a base, with these weights."""

    model_id: str | None
    base_id: str | None
    digest: str


@dataclass(frozen=True)
class Seen:
    """An alias and its version at the time of a read; None where the name had no alias."""

    alias_id: str | None
    version: int | None


def see(session: Session, principal: Principal, name: str) -> Seen:
    """Return what an alias is now, for a `put` that takes its time."""
    return _seen(find_alias(session, principal.project_id, name))


def _seen(alias: Alias | None) -> Seen:
    return Seen(None, None) if alias is None else Seen(alias.id, alias.version)


def put(
    session: Session,
    principal: Principal,
    catalogue: Catalogue,
    name: str,
    model_name: str,
    *,
    seen: Seen | None = None,
) -> Pointing:
    """Point an alias to a model, and make it when the project has none of that name.

    Args:
        seen: what the alias was when this was asked for; None where that is now.

    Returns:
        The alias; with no new version where it pointed to these weights already.

    Raises:
        InvalidValueError: when the name can't be an alias, the target is one, or somebody has pointed the
            alias elsewhere since: a later change is not undone.
        ModelNotAvailableError: when there is no such target.
    """
    alias = _find_locked(session, principal, name)
    if alias is None:
        _check_name(catalogue, name)
    target = _find_target(session, principal, catalogue, model_name)
    if seen not in (None, _seen(alias)) and not _points_to(session, alias, target):
        # Not an error that clients repeat by themselves.
        raise InvalidValueError(
            f"name: {name} was changed by somebody else while {model_name} was loaded for it, and stays so; "
            f"send the request again if {name} is still to point there.",
            param="name",
        )
    return point(session, principal, name, alias, target)


def _find_locked(session: Session, principal: Principal, name: str) -> Alias | None:
    """Return an alias that no one else changes, or makes, until the transaction ends."""
    lock_key(session, f"alias:{principal.project_id}:{name}")
    # A job that starts from what it points to holds the row.
    return find_alias(session, principal.project_id, name, for_update=True)


def _check_name(catalogue: Catalogue, name: str) -> None:
    if len(name) > _MAX_NAME_LENGTH or _NAME.fullmatch(name) is None:
        raise InvalidValueError(
            f"name: use up to {_MAX_NAME_LENGTH} ASCII letters, digits, '.', '_' and '-', in pieces that "
            "begin with a letter or digit and are parted by '/' or ':'.",
            param="name",
        )
    if name.lower().startswith("ft:"):
        raise InvalidValueError(
            "name: tuned models' names begin with 'ft:'; choose another beginning.", param="name"
        )
    # A name that the operator maps to a base may be one: clients send it already.
    if name in catalogue.bases:
        raise InvalidValueError(
            f"name: {name} is a base model's id; choose another.",
            param="name",
        )


def _find_target(session: Session, principal: Principal, catalogue: Catalogue, name: str) -> Target:
    """Return what a name stands for that is no alias; a model can't be deleted until the transaction ends."""
    if name not in catalogue.aliases and find_alias(session, principal.project_id, name) is not None:
        raise InvalidValueError(
            f"model: {name} is an alias itself; name the model that it points to (GET /v1/aliases tells it).",
            param="model",
        )
    model = session.scalar(select_locked(principal).where(Model.name == name))
    if model is not None:
        return Target(model.id, None, model.artifact_digest)
    base = names.find_base(session, catalogue, name)
    if base is None:
        raise ModelNotAvailableError(
            f"model: there is no model {name[:120]!r} that this project may call; GET /v1/models lists those "
            "there are.",
            param="model",
        )
    return Target(None, base.id, base.digest)


def select_locked(principal: Principal) -> Select[Model]:
    """Return the statement for models that the project may call, kept from deletion meanwhile."""
    return select(Model).where(names.is_callable(principal.project_id)).with_for_update(read=True, of=Model)


def point(
    session: Session,
    principal: Principal,
    name: str,
    alias: Alias | None,
    target: Target,
    restored_number: int | None = None,
) -> Pointing:
    """Point an alias (locked; None: a new one) to a target; nothing changes where it points there already."""
    if alias is not None and _points_to(session, alias, target):
        return _with_targets(session, [alias])[0]
    # The clock and not the transaction's time: that of one which waited for the lock is before its
    # forerunner's.
    now = func.clock_timestamp()
    if alias is None:
        alias = Alias(id=new_id("alias"), **principal.owner_columns(), name=name, version=0)
        session.add(alias)
    alias.model_id, alias.base_id = target.model_id, target.base_id
    alias.version += 1
    alias.updated_at = now
    # The version's foreign key names it.
    session.flush()
    session.add(
        AliasVersion(
            id=new_id("alias_version"),
            **principal.owner_columns(),
            alias_id=alias.id,
            number=alias.version,
            **target._asdict(),
            restored_number=restored_number,
            created_at=now,
        )
    )
    return _with_targets(session, [alias])[0]


def _points_to(session: Session, alias: Alias | None, target: Target) -> bool:
    return alias is not None and _target_of(get_version(session, alias, alias.version)) == target


def _target_of(version: AliasVersion) -> Target:
    return Target(version.model_id, version.base_id, version.digest)


def get_version(session: Session, alias: Alias, number: int) -> AliasVersion:
    version = session.scalar(
        select(AliasVersion).where(AliasVersion.alias_id == alias.id, AliasVersion.number == number)
    )
    if version is None:
        raise InvalidValueError(
            f"version: {alias.name} has no version {number}; the newest is {alias.version}.", param="version"
        )
    return version


def _with_targets(session: Session, aliases: Sequence[Alias]) -> list[Pointing]:
    """Return aliases with what they point to, as of one moment: what is shown of one belongs together."""
    rows = session.execute(
        select(
            Alias,
            func.coalesce(Model.name, Alias.base_id),
            func.coalesce(Model.artifact_digest, Base.digest),
        )
        .select_from(Alias)
        .outerjoin(Model, Model.id == Alias.model_id)
        .outerjoin(Base, Base.id == Alias.base_id)
        .where(Alias.id.in_([alias.id for alias in aliases]))
        .execution_options(populate_existing=True)
    ).all()
    found = {alias.id: Pointing(alias, model, digest) for alias, model, digest in rows}
    return [found[alias.id] for alias in aliases]


def get_row(session: Session, principal: Principal, name: str, *, for_update: bool = False) -> Alias:
    alias = (
        _find_locked(session, principal, name)
        if for_update
        else find_alias(session, principal.project_id, name)
    )
    if alias is None:
        raise NotFoundError(f"No such alias in the project of this key: {name[:120]!r}", param="name")
    return alias


def get(session: Session, principal: Principal, name: str) -> Pointing:
    return _with_targets(session, [get_row(session, principal, name)])[0]


def list_(
    session: Session, principal: Principal, *, after: str | None, limit: int
) -> tuple[list[Pointing], bool]:
    """Return a page of the project's aliases, newest first, and whether more follow."""
    is_listed = Alias.project_id == principal.project_id
    rows, has_more = page(session, Alias, is_listed, after=after, limit=limit)
    return _with_targets(session, rows), has_more


def delete(session: Session, principal: Principal, name: str) -> Alias:
    """Make an alias unknown; what it points to stays."""
    alias = get_row(session, principal, name, for_update=True)
    alias.deleted_at = func.now()
    return alias


def list_versions(
    session: Session, principal: Principal, name: str, *, after: str | None, limit: int
) -> tuple[list[tuple[AliasVersion, str]], bool]:
    """Return a page of versions with their models' names, newest first, and whether more follow."""
    alias = get_row(session, principal, name)
    cursor = find_cursor(session, AliasVersion, after, AliasVersion.alias_id == alias.id)
    statement = (
        select(AliasVersion, func.coalesce(Model.name, AliasVersion.base_id))
        .select_from(AliasVersion)
        .outerjoin(Model, Model.id == AliasVersion.model_id)
        .where(AliasVersion.alias_id == alias.id)
    )
    if cursor is not None:
        statement = statement.where(AliasVersion.number < cursor.number)
    rows = session.execute(statement.order_by(AliasVersion.number.desc()).limit(limit + 1)).all()
    return [(row[0], row[1]) for row in rows[:limit]], len(rows) > limit


@dataclass(frozen=True)
class WayBack:
    """Where a rollback goes: to a version's number, as the alias with this id was at its own version.

    `model` is the name of the tuned model there, None for a base.
    """

    alias_id: str
    alias_version: int
    number: int
    model: str | None


def find_way_back(
    session: Session, principal: Principal, catalogue: Catalogue, name: str, number: int | None
) -> WayBack:
    """Return where a rollback of an alias goes; nothing is changed.

    Without a number that is the version before, counted from what a rollback restored: repeated rollbacks go
    further back. Raises where that version, or its weights, do not exist.
    """
    alias = get_row(session, principal, name)
    if number is None:
        now = get_version(session, alias, alias.version)
        number = (now.restored_number or now.number) - 1
        if number == 0:
            raise InvalidValueError(
                f"version: nothing was before what {name} points to; name one of its versions.",
                param="version",
            )
    version = get_version(session, alias, number)
    _find_again(session, principal, catalogue, version)
    model = None if version.model_id is None else _name_of(session, version)
    return WayBack(alias.id, alias.version, number, model)


def roll_back(
    session: Session, principal: Principal, catalogue: Catalogue, name: str, way: WayBack
) -> Pointing | None:
    """Point an alias to an earlier version's target, as a new version; None where it has changed."""
    alias = get_row(session, principal, name, for_update=True)
    if (alias.id, alias.version) != (way.alias_id, way.alias_version):
        return None
    version = get_version(session, alias, way.number)
    target = _find_again(session, principal, catalogue, version)
    return point(session, principal, name, alias, target, version.restored_number or version.number)


def _find_again(
    session: Session, principal: Principal, catalogue: Catalogue, version: AliasVersion
) -> Target:
    """Return a version's target, which must have the weights that it had then, or nothing is as it was."""
    target: Target | None = None
    if version.base_id is not None:
        base = names.find_base(session, catalogue, version.base_id)
        target = None if base is None else Target(None, base.id, base.digest)
    else:
        model = session.scalar(select_locked(principal).where(Model.id == version.model_id))
        target = None if model is None else Target(model.id, None, model.artifact_digest)
    if target == _target_of(version):
        return target
    why = "is deleted, or this project's to call no more" if target is None else "has other weights since"
    raise ModelNotAvailableError(
        f"version: version {version.number} was {_name_of(session, version)}, which {why}. Nothing was "
        "changed; roll back to another version, or PUT a model.",
        param="version",
    )


def _name_of(session: Session, version: AliasVersion) -> str:
    return version.base_id or models.get_name(session, str(version.model_id))
