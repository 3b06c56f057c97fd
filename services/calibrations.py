"""Calibrations: what training costs on a base, a row for each machine, precision and number of threads."""

from dataclasses import dataclass

from pydantic import ValidationError
from sqlalchemy import func, or_, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from db.tables import Calibration as CalibrationRow
from db.tables import Worker
from luthier.core.estimates import Calibration
from luthier.core.ids import new_id
from luthier.core.specs import BaseFacts, Precision


@dataclass(frozen=True)
class Measured:
    """A calibration and where it comes from."""

    constants: Calibration
    worker_id: str
    hostname: str
    measured_at: int


def record(
    session: Session,
    *,
    hostname: str,
    worker_id: str,
    base: BaseFacts,
    precision: Precision,
    num_threads: int,
    code_version: str,
    constants: Calibration | None,
    error: str | None = None,
) -> None:
    """Keep what a probe measured, in place of what the machine measured before.

    Args:
        precision: as a job asks for it.
        constants: the result; None when the probe failed.
    """
    values = {
        "worker_id": worker_id,
        "base_digest": base.digest,
        "code_version": code_version,
        "constants": None if constants is None else constants.model_dump(mode="json"),
        "error": error,
        "measured_at": func.now(),
    }
    key = {"hostname": hostname, "base_id": base.id, "precision": precision, "num_threads": num_threads}
    session.execute(
        insert(CalibrationRow)
        .values(id=new_id("calibration"), **key, **values)
        .on_conflict_do_update(index_elements=list(key), set_=values)
    )


def is_recorded(
    session: Session,
    *,
    hostname: str,
    base: BaseFacts,
    precision: Precision,
    num_threads: int,
    code_version: str,
    retry_seconds: float,
) -> bool:
    """Whether a machine has measured a base with this code, or has failed to a short while ago.

    Args:
        base: the base as it is on the machine.
        precision: as a job asks for it.

    Returns:
        Whether there is nothing to do.
    """
    age = func.extract("epoch", func.now() - CalibrationRow.measured_at)
    found = session.scalar(
        select(CalibrationRow.id).where(
            CalibrationRow.hostname == hostname,
            CalibrationRow.base_id == base.id,
            CalibrationRow.base_digest == base.digest,
            CalibrationRow.precision == precision,
            CalibrationRow.num_threads == num_threads,
            CalibrationRow.code_version == code_version,
            or_(CalibrationRow.constants.is_not(None), age < retry_seconds),
        )
    )
    return found is not None


def find_measured(
    session: Session, base: BaseFacts, precision: Precision, *, hostname: str | None = None
) -> tuple[Measured | None, str]:
    """Return the newest calibration of a base, or why there is none.

    Args:
        base: the base as the API has it.
        precision: as the job asks for it.
        hostname: a machine whose own calibration goes before newer ones.

    Returns:
        The calibration, and a sentence that says why it is None.
    """
    rows = session.scalars(
        select(CalibrationRow)
        .where(CalibrationRow.base_id == base.id, CalibrationRow.base_digest == base.digest)
        .order_by((CalibrationRow.hostname == hostname).desc(), CalibrationRow.measured_at.desc())
    ).all()
    failed: str | None = None
    for row in rows:
        if row.constants is None:
            failed = failed or row.error
            continue
        try:
            constants = Calibration.model_validate(row.constants)
        except ValidationError:
            # Of another version of the code; its worker measures anew once it has no job.
            continue
        if precision in (row.precision, constants.precision):
            at = int(row.measured_at.timestamp())
            return Measured(constants, row.worker_id, row.hostname, at), ""
    if failed is not None:
        # How it ended stands in the operator's log: a library's words may hold paths.
        return None, "The probe of a worker failed; its operator's log says how."
    return None, (
        f"No worker has measured {base.id} in precision {precision} yet; each does so when it has no job."
    )


def find_worker_memory(session: Session) -> int | None:
    """Return the memory of the worker that was last heard of, on which "auto" may depend."""
    facts = session.scalar(select(Worker.facts).order_by(Worker.heartbeat_at.desc()).limit(1))
    found = (facts or {}).get("memory_bytes")
    return found if isinstance(found, int) else None
