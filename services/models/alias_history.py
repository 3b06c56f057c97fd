"""What an alias has pointed to, and the way back to it."""

from dataclasses import dataclass

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from db.queries import find_cursor
from db.tables import AliasVersion, Model
from luthier.bases.catalogue import Catalogue
from luthier.core.errors import InvalidValueError, ModelNotAvailableError
from services.accounts.auth import Principal
from services.models import aliases, models, names
from services.models.aliases import Pointing, Target


@dataclass(frozen=True)
class PastPointing:
    """A version of an alias, and the name of what it points to."""

    version: AliasVersion
    model: str


def list_versions(
    session: Session, principal: Principal, name: str, *, after: str | None, limit: int
) -> tuple[list[PastPointing], bool]:
    """Return a page of what an alias has pointed to, newest first, and whether more follow.

    Raises:
        InvalidValueError: when `after` is no version of it.
    """
    alias = aliases.get_row(session, principal, name)
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
    return [PastPointing(*row) for row in rows[:limit]], len(rows) > limit


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

    Args:
        number: the version; the one before when None, counted from what a rollback restored: one rollback
            after another goes further back.

    Raises:
        InvalidValueError: when it has no such version.
        ModelNotAvailableError: when the weights of that version are not there any more.
    """
    alias = aliases.get_row(session, principal, name)
    if number is None:
        now = aliases.get_version(session, alias, alias.version)
        number = (now.restored_number or now.number) - 1
        if number == 0:
            raise InvalidValueError(
                f"version: nothing was before what {name} points to; name one of its versions.",
                param="version",
            )
    version = aliases.get_version(session, alias, number)
    _find_again(session, principal, catalogue, version)
    model = None if version.model_id is None else _name_of(session, version)
    return WayBack(alias.id, alias.version, number, model)


def roll_back(
    session: Session, principal: Principal, catalogue: Catalogue, name: str, way: WayBack
) -> Pointing | None:
    """Point an alias to what an earlier version pointed to, as a new version.

    Returns:
        The alias; None, and nothing is changed, where it was pointed elsewhere since the way was found.

    Raises:
        ModelNotAvailableError: when the weights of that version are not there any more.
    """
    alias = aliases.get_row(session, principal, name, for_update=True)
    if (alias.id, alias.version) != (way.alias_id, way.alias_version):
        return None
    version = aliases.get_version(session, alias, way.number)
    target = _find_again(session, principal, catalogue, version)
    return aliases.point(session, principal, name, alias, target, version.restored_number or version.number)


def _find_again(
    session: Session, principal: Principal, catalogue: Catalogue, version: AliasVersion
) -> Target:
    """Return a version's target, which must have the weights that it had then, or nothing is as it was."""
    target: Target | None = None
    if version.base_id is not None:
        base = names.find_base(session, catalogue, version.base_id)
        target = None if base is None else Target.of_base(base)
    else:
        model = session.scalar(aliases.select_locked(principal).where(Model.id == version.model_id))
        target = None if model is None else Target.of_model(model)
    if target == Target.of_version(version):
        return target
    why = "is deleted, or this project's to call no more" if target is None else "has other weights since"
    raise ModelNotAvailableError(
        f"version: version {version.number} was {_name_of(session, version)}, which {why}. Nothing was "
        "changed; roll back to another version, or PUT a model.",
        param="version",
    )


def _name_of(session: Session, version: AliasVersion) -> str:
    return version.base_id or models.get_name(session, str(version.model_id))
