"""Checkpoints of a job: which one was made at a step, and which ones make room for newer ones.

How one is made callable is in services/models/models.py: register.
"""

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from db.tables import Checkpoint, Model
from services.models import continuation, models


def find(session: Session, job_id: str, step: int) -> tuple[Checkpoint, Model] | None:
    """Return a job's checkpoint of a step and its model, both locked until the transaction ends, or None."""
    row = session.execute(
        select(Checkpoint, Model)
        .join(Model, Model.id == Checkpoint.model_id)
        .where(Checkpoint.job_id == job_id, Checkpoint.step_number == step, Checkpoint.deleted_at.is_(None))
        .with_for_update()
    ).one_or_none()
    return None if row is None else (row[0], row[1])


def retire(session: Session, job_id: str, *, keep: int, spared_step: int | None) -> list[str]:
    """Make all but the newest checkpoints of a job unknown, but for those that others need.

    Needed are those that others go on from, and those that an alias points to.
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
    models.end_permissions(session, [model.id for _, model in rows if model.id not in needed])
    session.flush()
    return prefixes
