"""The order in which waiting jobs are taken: projects take turns, and each has its oldest first."""

from typing import Any, Literal

from sqlalchemy import ColumnElement, func, select
from sqlalchemy.orm import aliased

from db.tables import Attempt, Job
from luthier.core.states import JobStatus

Stage = Literal["prepare", "train"]

_AT_WORK = {"prepare": [JobStatus.VALIDATING_FILES], "train": [JobStatus.RUNNING, JobStatus.PAUSING]}


def by_turns(stage: Stage) -> tuple[ColumnElement[Any], ...]:
    """Return what to order waiting jobs of a stage by, in a statement without FOR UPDATE.

    First the project of which the fewest are at work, a job's place among its own project's counted in; of
    equals the one that was served longest ago.
    """
    other = aliased(Job)
    num_at_work = (
        select(func.count())
        .where(
            other.project_id == Job.project_id,
            other.status.in_(_AT_WORK[stage]),
            other.lease_expires_at > func.now(),
        )
        .correlate(Job)
        .scalar_subquery()
    )
    place = func.row_number().over(partition_by=Job.project_id, order_by=(Job.created_at, Job.id))
    last_served = (
        select(func.max(Attempt.created_at))
        .where(Attempt.project_id == Job.project_id, Attempt.stage == stage)
        .correlate(Job)
        .scalar_subquery()
    )
    return num_at_work + place, last_served.asc().nulls_first(), Job.created_at.asc(), Job.id.asc()
