"""Resolves public model names (alias, tuned model, checkpoint, base) within a project.

An unknown name raises `ModelNotFoundError`; it never falls back to the base.
"""

from dataclasses import dataclass

from sqlalchemy import ColumnElement, Select, Text, and_, bindparam, case, literal, or_, select
from sqlalchemy.orm import Session, aliased

from db.tables import Alias, Base, CheckpointPermission, Model
from luthier.bases.catalogue import Catalogue
from luthier.core.errors import ModelNotAvailableError, ModelNotFoundError
from luthier.core.inference import ModelTarget
from services.accounts.auth import Principal


def unknown_model(name: str) -> ModelNotFoundError:
    """Return the error for a name that is unknown in the caller's project."""
    return ModelNotFoundError(
        f"The model `{name[:120]}` does not exist or you do not have access to it.", param="model"
    )


def is_callable(project_id: str | ColumnElement[str]) -> ColumnElement[bool]:
    """Return the condition, over rows of `Model`, that a project may call it: its own, or shared."""
    permitted = select(CheckpointPermission.model_id).where(
        CheckpointPermission.grantee_project_id == project_id, CheckpointPermission.deleted_at.is_(None)
    )
    return and_(Model.deleted_at.is_(None), or_(Model.project_id == project_id, Model.id.in_(permitted)))


def find_callable(session: Session, principal: Principal, name: str) -> Model | None:
    """Return the tuned model or checkpoint of that name that the project may call: its own, or shared."""
    return session.scalar(select(Model).where(Model.name == name, is_callable(principal.project_id)))


def find_base(session: Session, catalogue: Catalogue, name: str) -> Base | None:
    """Return the fetched base that a name or a mapped name stands for, or None."""
    try:
        entry = catalogue.resolve(name)
    except ModelNotAvailableError:
        return None
    return session.get(Base, entry.id)


def _build_look_up() -> Select[Alias | None, Model | None, Model | None, Base | None]:
    """Build the statement of `look_up`, once: that takes longer than it runs."""
    project_id, name, base_id = (bindparam(key, type_=Text) for key in ("project_id", "name", "base_id"))
    one_row = select(literal(1)).subquery()
    named, whole = aliased(Model), aliased(Model)
    named_id = select(named.id).where(named.name == name, named.deleted_at.is_(None)).scalar_subquery()
    is_alias = Alias.id.is_not(None)
    is_same = and_(Alias.name == name, Alias.project_id == project_id)
    model_id = case((is_alias, Alias.model_id), else_=named_id)
    return (
        select(Alias, Model, whole, Base)
        .select_from(one_row)
        .outerjoin(Alias, and_(is_same, Alias.deleted_at.is_(None)))
        .outerjoin(Model, and_(Model.id == model_id, is_callable(project_id)))
        .outerjoin(whole, whole.id == Model.full_model_id)
        .outerjoin(Base, Base.id == case((is_alias, Alias.base_id), else_=base_id))
    )


_LOOK_UP = _build_look_up()


@dataclass(frozen=True)
class Named:
    """What a public name stands for at one moment: a model, or a base, or nothing that can be called.

    `alias` is there where the name is one, and `full_model` is the full model below an adapter.
    """

    alias: Alias | None = None
    model: Model | None = None
    full_model: Model | None = None
    base: Base | None = None

    @property
    def is_callable(self) -> bool:
        """Whether there is a model or a base."""
        return self.model is not None or self.base is not None


def look_up(session: Session, catalogue: Catalogue, project_id: str, name: str) -> Named:
    """Return what a name stands for: first the project's aliases, then its models, then the bases.

    It is one statement, and so one moment: while an alias is pointed elsewhere, its old target is found or
    its new one.
    """
    entry = catalogue.bases.get(catalogue.aliases.get(name, name))
    values = {"project_id": project_id, "name": name, "base_id": None if entry is None else entry.id}
    alias, model, full_model, base = session.execute(_LOOK_UP, values).one()
    return Named(alias, model, full_model, _if_offered(catalogue, base))


def _if_offered(catalogue: Catalogue, base: Base | None) -> Base | None:
    return base if base is not None and base.id in catalogue.bases else None


def get_named(session: Session, principal: Principal, catalogue: Catalogue, name: str) -> Named:
    """Return what a name stands for, with a model or a base in it."""
    named = look_up(session, catalogue, principal.project_id, name)
    if named.is_callable:
        return named
    raise not_callable(named, name)


def not_callable(named: Named, name: str) -> ModelNotFoundError:
    """Return the error for a name behind which there is neither a model nor a base."""
    if named.alias is None:
        return unknown_model(name)
    return ModelNotFoundError(
        f"The alias `{name}` points to a model that is gone, or that this project may not call any more. "
        f"PUT /v1/aliases/{name} another.",
        param="model",
    )


def resolve(session: Session, principal: Principal, catalogue: Catalogue, name: str) -> ModelTarget:
    """Turn a public name into what the inference server runs; by one statement."""
    named = look_up(session, catalogue, principal.project_id, name)
    model, full_model = named.model, named.full_model
    if model is not None:
        return ModelTarget(
            model=name,
            base_id=model.base_id,
            project_id=principal.project_id,
            artifact=model.artifact_key,
            digest=model.artifact_digest,
            full_model=None if full_model is None else full_model.artifact_key,
            full_model_digest=None if full_model is None else full_model.artifact_digest,
            is_pinned=model.pinned_at is not None,
            resolved_model=model.name,
        )
    if named.base is not None:
        base_id = named.base.id
        return ModelTarget(
            model=name, base_id=base_id, project_id=principal.project_id, resolved_model=base_id
        )
    raise not_callable(named, name)


def list_aliased(session: Session, principal: Principal, catalogue: Catalogue) -> list[Named]:
    """Return the project's aliases with what they point to, newest first; those that can't be called not."""
    rows = session.execute(
        select(Alias, Model, Base)
        .select_from(Alias)
        .outerjoin(Model, and_(Model.id == Alias.model_id, is_callable(principal.project_id)))
        .outerjoin(Base, Base.id == Alias.base_id)
        .where(Alias.project_id == principal.project_id, Alias.deleted_at.is_(None))
        .order_by(Alias.created_at.desc(), Alias.id.desc())
    ).all()
    found = [Named(alias, model, base=_if_offered(catalogue, base)) for alias, model, base in rows]
    return [named for named in found if named.is_callable]
