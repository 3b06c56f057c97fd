"""Continuation: jobs that start from a tuned model, and what keeps such a model from being deleted."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, exists, or_, select
from sqlalchemy.orm import Session, aliased

from db.queries import find_alias
from db.tables import Alias, Base, Job, Model
from luthier.bases.catalogue import Catalogue
from luthier.core.errors import ModelInUseError, ModelNotAvailableError
from luthier.core.specs import TrainingSpec, TunedModel
from luthier.core.states import TERMINAL_STATUSES
from luthier.methods import discover
from luthier.methods._tuning import check_tuning, inherit_tuning
from services.accounts.auth import Principal
from services.models.names import find_callable

_NUM_NAMED = 10


@dataclass(frozen=True)
class Origin:
    """Where a job starts: a base, or a tuned model of it; and what it tunes, checked, "auto" still in it."""

    base_id: str
    tuning: dict[str, Any]
    parent: TunedModel | None = None
    full_model: TunedModel | None = None


@dataclass(frozen=True)
class StoredArtifact:
    """The storage key of an artifact that a job builds on, and the digest that the job was made with."""

    name: str
    key: str
    digest: str


def find_origin(
    session: Session, principal: Principal, catalogue: Catalogue, name: str, tuning: dict[str, Any]
) -> Origin:
    """Return where a job starts that names a base or a tuned model.

    An alias stands for what it points to now, unless its name is mapped to a base. A tuned model can't be
    deleted, and an alias not pointed elsewhere, until the transaction ends.

    Raises:
        ModelNotAvailableError: when there is no such model, or no job can start from it here.
        InvalidRequestError: when the tuning is wrong, or contradicts the model's; names the member.
    """
    model, base_name = _follow(session, principal, catalogue, name)
    if model is None:
        return Origin(catalogue.resolve(base_name).id, check_tuning(tuning))
    _check_base(session, catalogue, model)
    made_with = TrainingSpec.model_validate(session.get_one(Job, model.job_id).spec).tuning
    parent = _described(model)
    method = discover()[model.method]
    if not method.is_whole_model:
        full_model = None
        if model.full_model_id is not None:
            full_model = _described(session.get_one(Model, model.full_model_id))
        return Origin(model.base_id, inherit_tuning(tuning, made_with, name=model.name), parent, full_model)
    if tuning.get("type", method.name) == method.name:
        return Origin(model.base_id, inherit_tuning(tuning, made_with, name=model.name), parent)
    # Another method starts anew on the full model, as on a base.
    return Origin(model.base_id, check_tuning(tuning), parent, full_model=parent)


def _follow(
    session: Session, principal: Principal, catalogue: Catalogue, name: str
) -> tuple[Model | None, str]:
    """Return the project's model that a name stands for, locked, or None and what may be a base's name.

    A mapped name means the operator's base here, also where an alias of that name answers requests: or the
    jobs of a client that always sends it would start from its last model without being asked to.
    """
    if name in catalogue.aliases:
        return None, name
    alias = find_alias(session, principal.project_id, name, for_share=True)
    if alias is not None and alias.base_id is not None:
        return None, alias.base_id
    is_named = Model.name == name if alias is None else Model.id == alias.model_id
    model = session.scalar(
        select(Model)
        .where(is_named, Model.project_id == principal.project_id, Model.deleted_at.is_(None))
        .with_for_update(read=True)
    )
    if model is None and (alias is not None or find_callable(session, principal, name) is not None):
        what = f"{name} is" if alias is None else f"The alias {name} points to"
        raise ModelNotAvailableError(
            f"{what} another project's model; a job continues a model of its own project only.", param="model"
        )
    return model, name


def _described(model: Model) -> TunedModel:
    return TunedModel(model_id=model.id, name=model.name, method=model.method, digest=model.artifact_digest)


def _check_base(session: Session, catalogue: Catalogue, model: Model) -> None:
    """Refuse a model whose base is no longer what it was tuned from."""
    if model.base_id not in catalogue.bases:
        raise ModelNotAvailableError(
            f"{model.name} was tuned from {model.base_id}, which is no longer in this service's models.toml.",
            param="model",
        )
    base = session.get(Base, model.base_id)
    if base is not None and base.digest != model.base_digest:
        raise ModelNotAvailableError(
            f"{model.name} was tuned from another version of {model.base_id} ({model.base_digest}) than the "
            f"one that is here now ({base.digest}). Start from the base.",
            param="model",
        )


def list_artifacts(session: Session, spec: TrainingSpec) -> dict[str, StoredArtifact]:
    """Return the artifacts that a job builds on, by the name of the spec's member."""
    named = {"parent": spec.parent, "foundation": spec.foundation}
    return {
        member: StoredArtifact(model.name, session.get_one(Model, model.model_id).artifact_key, model.digest)
        for member, model in named.items()
        if model is not None
    }


def check_unneeded(session: Session, model: Model) -> None:
    """Refuse to delete a model that others continue, or that an alias of its project points to."""
    aliases = (
        select(Alias.name)
        .where(Alias.model_id == model.id, Alias.project_id == model.project_id, Alias.deleted_at.is_(None))
        .order_by(Alias.name)
    )
    jobs = (
        select(Job.id)
        .where(Job.parent_model_id == model.id, Job.status.not_in(TERMINAL_STATUSES))
        .order_by(Job.created_at, Job.id)
    )
    heirs = (
        select(Model.name)
        .where(
            or_(Model.parent_model_id == model.id, Model.full_model_id == model.id),
            Model.deleted_at.is_(None),
        )
        .order_by(Model.created_at, Model.id)
    )
    for statement, why in (
        (aliases, "aliases point to it: {shown}. Point them elsewhere, or delete them, first."),
        (jobs, "{shown} {has} started from it and not ended yet. Cancel, or wait for the end."),
        (heirs, "{shown} {has} been tuned from it. Delete those first."),
    ):
        names = session.scalars(statement).all()
        if names:
            shown, has = _shown(names), "has" if len(names) == 1 else "have"
            reason = why.format(shown=shown, has=has)
            raise ModelInUseError(f"{model.name} can't be deleted: {reason}", param="model")


def _shown(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_NUM_NAMED])
    return shown if len(names) <= _NUM_NAMED else f"{shown} and {len(names) - _NUM_NAMED} more"


def is_needed() -> ColumnElement[bool]:
    """Return the condition, over rows of `Model`, that `check_unneeded` refuses."""
    heir = aliased(Model)
    unfinished = exists().where(Job.parent_model_id == Model.id, Job.status.not_in(TERMINAL_STATUSES))
    heirs = exists().where(
        or_(heir.parent_model_id == Model.id, heir.full_model_id == Model.id),
        heir.deleted_at.is_(None),
    )
    # An alias of another project, with which the model is shared, does not keep it.
    pointing = exists().where(
        Alias.model_id == Model.id, Alias.project_id == Model.project_id, Alias.deleted_at.is_(None)
    )
    return or_(unfinished, heirs, pointing)
