"""Models: registration, pins, deletion, and the checkpoints of jobs."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import exists, func, or_, select, update
from sqlalchemy.orm import Session

from db.queries import find_alias
from db.tables import Alias, Base, Checkpoint, CheckpointPermission, Job, Model
from luthier.bases.catalogue import Catalogue
from luthier.core.errors import InvalidValueError, PermissionDeniedError
from luthier.core.ids import new_id, new_model_suffix
from luthier.core.specs import BaseFacts, TrainingSpec
from services.accounts.auth import Principal
from services.models import continuation, names


def record_base(session: Session, facts: BaseFacts) -> None:
    """Note that a base has been fetched; the newest facts win."""
    session.merge(
        Base(
            id=facts.id,
            digest=facts.digest,
            tokenizer_digest=facts.tokenizer_digest,
            context_length=facts.context_length,
            facts=facts.model_dump(mode="json"),
        )
    )


def list_bases(session: Session) -> Sequence[Base]:
    """Return the bases that have been fetched."""
    return session.scalars(select(Base).order_by(Base.id)).all()


def make_name(base_id: str, organization_slug: str, suffix: str | None) -> str:
    """Return a fresh name of OpenAI's form, `ft:BASE:ORG:SUFFIX:ID8`; the suffix may be empty."""
    return f"ft:{base_id}:{organization_slug}:{suffix or ''}:{new_model_suffix()}"


def find(session: Session, principal: Principal, name: str, *, for_update: bool = False) -> Model | None:
    """Return the project's tuned model or checkpoint of that name, or None; locked when that is asked for."""
    statement = select(Model).where(
        Model.name == name, Model.project_id == principal.project_id, Model.deleted_at.is_(None)
    )
    return session.scalar(statement.with_for_update() if for_update else statement)


def get_own(session: Session, principal: Principal, catalogue: Catalogue, name: str) -> Model:
    """Return the project's own tuned model or checkpoint; refuses aliases, bases and shared models."""
    model = names.find_callable(session, principal, name)
    if model is None:
        if find_alias(session, principal.project_id, name) is not None:
            raise InvalidValueError(
                f"{name} is an alias, which may point elsewhere a moment later. Name the model itself; "
                "GET /v1/aliases tells it.",
                param="model",
            )
        if names.find_base(session, catalogue, name) is not None:
            raise InvalidValueError(
                f"{name} is a base model; only tuned models are pinned and downloaded here.", param="model"
            )
        raise names.unknown_model(name)
    if model.project_id != principal.project_id:
        raise PermissionDeniedError(
            f"{name} is another project's; yours may call it, not delete or download it.", param="model"
        )
    return model


def set_pinned(
    session: Session, principal: Principal, catalogue: Catalogue, name: str, *, is_pinned: bool
) -> Model:
    """Have inference servers keep the project's own model in memory from its next request on, or not."""
    found = get_own(session, principal, catalogue, name)
    model = session.get_one(Model, found.id, with_for_update=True, populate_existing=True)
    if (model.pinned_at is not None) is not is_pinned:
        model.pinned_at = func.now() if is_pinned else None
        session.flush()
    return model


def list_(session: Session, principal: Principal) -> Sequence[Model]:
    """Return the tuned models and checkpoints that the project may call, newest first."""
    return session.scalars(
        select(Model)
        .where(names.is_callable(principal.project_id))
        .order_by(Model.created_at.desc(), Model.id.desc())
    ).all()


def register(
    session: Session,
    job: Job,
    spec: TrainingSpec,
    *,
    name: str,
    kind: str,
    step: int,
    artifact_key: str,
    artifact_digest: str,
    metrics: dict[str, Any],
) -> Checkpoint:
    """Make a published artifact callable under a name, and note it as a checkpoint of its job.

    The caller holds the job's lease in the same transaction. A step that was registered before makes no
    second model: it takes the newer artifact, keeps its name as a checkpoint, and gets the model's name,
    even if it was retired or deleted meanwhile, once it is the result. But a model that
    others continue, or that an alias points to, keeps its weights: where the newer ones differ, it is no
    checkpoint any more, and the step gets a new model.
    """
    if spec.base is None:
        raise ValueError("a job that trains has a resolved spec")
    existing = session.execute(
        select(Checkpoint, Model)
        .join(Model, Model.id == Checkpoint.model_id)
        .where(Checkpoint.job_id == job.id, Checkpoint.step_number == step)
        # A job may be about to start from it.
        .with_for_update(of=Model)
    ).one_or_none()
    checkpoint: Checkpoint | None = None
    if existing is not None:
        checkpoint, model = existing
        if model.artifact_digest == artifact_digest or not _is_needed(session, model):
            model.artifact_key, model.artifact_digest = artifact_key, artifact_digest
            if kind == "tuned":
                model.kind, model.name = kind, name
                checkpoint.deleted_at = model.deleted_at = model.bytes_deleted_at = None
            checkpoint.metrics = metrics
            session.flush()
            return checkpoint
    owner = job.owner_columns()
    model = Model(
        id=new_id("model"),
        **owner,
        name=name,
        kind=kind,
        base_id=job.base_id,
        base_digest=spec.base.digest,
        parent_model_id=None if spec.parent is None else spec.parent.model_id,
        full_model_id=None if spec.foundation is None else spec.foundation.model_id,
        job_id=job.id,
        method=spec.tuning["type"],
        step=step,
        artifact_key=artifact_key,
        artifact_digest=artifact_digest,
    )
    session.add(model)
    session.flush()
    if checkpoint is None:
        checkpoint = Checkpoint(id=new_id("checkpoint"), **owner, job_id=job.id, step_number=step)
        session.add(checkpoint)
    checkpoint.model_id, checkpoint.metrics = model.id, metrics
    session.flush()
    return checkpoint


def _is_needed(session: Session, model: Model) -> bool:
    # An alias of any project: its history says which weights it pointed to.
    pointing = exists().where(Alias.model_id == Model.id, Alias.deleted_at.is_(None))
    is_needed = or_(continuation.is_needed(), pointing)
    return session.scalar(select(Model.id).where(Model.id == model.id, is_needed)) is not None


def end_permissions(session: Session, model_ids: Sequence[str]) -> None:
    """End the permissions of deleted models, which may come back as their job's result."""
    session.execute(
        update(CheckpointPermission)
        .where(CheckpointPermission.model_id.in_(model_ids), CheckpointPermission.deleted_at.is_(None))
        .values(deleted_at=func.now())
    )


def delete(session: Session, principal: Principal, catalogue: Catalogue, name: str) -> Model:
    """Make a tuned model unknown, unless it is needed; the caller deletes its bytes after the commit."""
    model = find(session, principal, name, for_update=True)
    if model is None:
        if names.find_base(session, catalogue, name) is not None:
            raise PermissionDeniedError(f"{name} is a base model; bases can't be deleted.", param="model")
        # Not the project's own: it says whether that is all.
        get_own(session, principal, catalogue, name)
        raise names.unknown_model(name)
    continuation.check_unneeded(session, model)
    model.deleted_at = func.now()
    checkpoint = session.scalar(
        select(Checkpoint).where(Checkpoint.model_id == model.id, Checkpoint.deleted_at.is_(None))
    )
    if checkpoint is not None:
        checkpoint.deleted_at = func.now()
    end_permissions(session, [model.id])
    return model


def get_name(session: Session, model_id: str) -> str:
    return session.get_one(Model, model_id).name


def find_checkpoint(session: Session, job_id: str, step: int) -> tuple[Checkpoint, Model] | None:
    """Return a job's checkpoint of a step and its model, both locked until the transaction ends, or None."""
    row = session.execute(
        select(Checkpoint, Model)
        .join(Model, Model.id == Checkpoint.model_id)
        .where(Checkpoint.job_id == job_id, Checkpoint.step_number == step, Checkpoint.deleted_at.is_(None))
        .with_for_update()
    ).one_or_none()
    return None if row is None else (row[0], row[1])


def retire_checkpoints(session: Session, job_id: str, *, keep: int, spared_step: int | None) -> list[str]:
    """Make all but the newest checkpoints of a job unknown, but for those that others need.

    Needed are those that others continue and those that an alias points to. Returns the storage prefixes of
    the retired artifacts, to be deleted after the commit; the checkpoint of `spared_step` always stays.
    """
    rows = session.execute(
        select(Checkpoint, Model)
        .join(Model, Model.id == Checkpoint.model_id)
        .where(Checkpoint.job_id == job_id, Checkpoint.deleted_at.is_(None))
        .order_by((Checkpoint.step_number == (spared_step or -1)).desc(), Checkpoint.step_number.desc())
        .offset(keep)
        # A job may be about to start from one of them, an alias about to point to it.
        .with_for_update(of=Model)
    ).all()
    ids = [model.id for _, model in rows]
    needed = set(session.scalars(select(Model.id).where(Model.id.in_(ids), continuation.is_needed())))
    prefixes = []
    for checkpoint, model in rows:
        if model.id in needed:
            continue
        checkpoint.deleted_at = func.now()
        model.deleted_at = func.now()
        prefixes.append(model.artifact_key)
    end_permissions(session, [model.id for _, model in rows if model.id not in needed])
    return prefixes
