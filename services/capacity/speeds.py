"""How fast jobs were: the measured speed of a worker's device, and finished jobs on a base."""

from typing import Any

from pydantic import ValidationError
from sqlalchemy import select
from sqlalchemy.orm import Session

from db.tables import Job, Worker
from luthier.core.cost_model import DeviceSpeed, FinishedJob, Work
from luthier.core.events import RunReport
from luthier.core.shapes import BaseShape
from luthier.core.specs import BaseFacts, Precision
from luthier.methods._tuning import parse_tuning
from services.jobs.reports import PrepareReport

_MAX_JOBS = 40


def find_speed(
    session: Session,
    *,
    hostname: str | None = None,
    num_threads: int | None = None,
    device_setting: str | None = None,
) -> DeviceSpeed | None:
    """Return what the last living worker measured; with a host name, one of that machine set up the same."""
    speed = Worker.facts["speed"]
    statement = select(speed).where(speed.is_not(None)).order_by(Worker.heartbeat_at.desc()).limit(1)
    if hostname is not None:
        statement = statement.where(
            Worker.hostname == hostname,
            speed["num_threads"].as_integer() == num_threads,
            Worker.facts["device_setting"].as_string() == device_setting,
        )
    found = session.scalar(statement)
    try:
        return None if found is None else DeviceSpeed.model_validate(found)
    except ValidationError:
        # Of another version of the code.
        return None


def find_worker_memory(session: Session) -> int | None:
    """Return the memory of the worker that was last alive, on which "auto" may depend."""
    facts = session.scalar(select(Worker.facts).order_by(Worker.heartbeat_at.desc()).limit(1))
    found = (facts or {}).get("memory_bytes")
    return found if isinstance(found, int) else None


def list_finished(
    session: Session, base: BaseFacts, shape: BaseShape, precision: Precision
) -> tuple[list[FinishedJob], DeviceSpeed | None]:
    """Return the newest jobs that succeeded on a base, all on the device of the newest, and that device.

    The device's `product_flops` are empty: these jobs say how fast it is.
    """
    run = Job.report["run"]
    reports = session.scalars(
        select(Job.report)
        .where(
            Job.base_id == base.id,
            Job.status == "succeeded",
            Job.finished_at.is_not(None),
            run["base_digest"].as_string() == base.digest,
        )
        .order_by(Job.finished_at.desc())
        .limit(_MAX_JOBS)
    ).all()
    found: list[FinishedJob] = []
    device: DeviceSpeed | None = None
    for report in reports:
        try:
            ran = RunReport.model_validate(report["run"])
            prepared = PrepareReport.model_validate(report["prepare"])
        except (ValidationError, KeyError, TypeError):
            continue
        if precision not in (ran.spec.training.precision, ran.precision):
            continue
        here = DeviceSpeed(
            device=ran.device, num_threads=ran.num_threads, precision=ran.precision, product_flops={}
        )
        device = device or here
        if here == device and ran.steps_done > 0:
            found.append(_finished_job(ran, prepared, shape))
    return found, device


def _finished_job(ran: RunReport, prepared: PrepareReport, shape: BaseShape) -> FinishedJob:
    rows, validation = prepared.training, prepared.validation
    num_held_back = prepared.num_validation_rows or 0
    if validation is not None:
        num_scored, num_reference = validation.num_tokens, rows.num_tokens + validation.num_tokens
    else:
        # Rows that are held back are among the file's.
        num_scored = round(num_held_back * rows.num_tokens / max(1, rows.num_rows))
        num_reference = rows.num_tokens
    return finished_job(
        ran,
        shape,
        num_scored_tokens=num_scored,
        num_reference_tokens=num_reference,
        tokens_per_example=rows.num_tokens / max(1, rows.num_rows),
    )


def finished_job(
    ran: RunReport,
    shape: BaseShape,
    *,
    num_scored_tokens: int,
    num_reference_tokens: int,
    tokens_per_example: float,
) -> FinishedJob:
    """Return the work and seconds of a finished job, by its report, in the terms of the cost model."""
    epochs: Any = ran.spec.hyperparameters.n_epochs
    has_pairs = ran.spec.dpo is not None
    num_evaluations = len(ran.evaluations) + (ran.base_evaluation is not None)
    method, params = parse_tuning(ran.spec.tuning)
    # The run counts the tokens of rows alone.
    num_rows = ran.tokens_seen / max(1, tokens_per_example) * (2 if has_pairs else 1)
    num_virtual = method.cost(params, shape).num_virtual_tokens * num_rows
    work = Work(
        is_whole_model=method.is_whole_model,
        num_tokens=ran.tokens_seen + round(num_virtual),
        num_supervised_tokens=ran.supervised_tokens_seen,
        num_steps=ran.steps_done,
        num_epochs=max(1, num_evaluations - 1) if ran.stopped_early else epochs,
        num_evaluations=num_evaluations,
        num_scored_tokens=num_scored_tokens,
        num_prompts=len(ran.spec.training.sample_prompts),
        num_reference_tokens=num_reference_tokens if has_pairs else 0,
        num_parameters=ran.num_trained_parameters,
        artifact_bytes=ran.artifact_bytes or 0,
    )
    return FinishedJob(ran.method, has_pairs, work, ran.seconds)
