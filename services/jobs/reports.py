"""The report of a job, in the job's row: what prepare found in its files, what the run measured."""

from typing import Any

from sqlalchemy import ColumnElement, cast, func
from sqlalchemy.dialects.postgresql import JSONB

from db.tables import Job
from luthier.core.events import RunReport
from luthier.core.specs import Frozen


class FileReport(Frozen):
    """What became of a file's rows. Lengths are in tokens, after truncation; lines are the first 20.

    `sha256` is that of the file as it was uploaded, 64 hex digits.
    """

    file_id: str
    sha256: str
    num_rows: int
    num_tokens: int
    num_supervised_tokens: int
    num_truncated: int
    num_dropped: int
    longest_tokens: int
    truncated_lines: list[int]
    dropped_lines: list[int]


class PrepareReport(Frozen):
    """Prepare's part of a report; `validation` is about a validation file, absent without one.

    `num_train_rows` and `num_validation_rows` are what a split and dropped rows left, preferences where the
    job learns from them. What older versions stored lacks them.
    """

    training: FileReport
    validation: FileReport | None = None
    num_train_rows: int | None = None
    num_validation_rows: int | None = None
    tokenize_seconds: float


def with_prepare(report: PrepareReport) -> dict[str, Any]:
    """Return the column of a job that is prepared: whatever an earlier run measured is of no more use."""
    return {"prepare": report.model_dump(mode="json")}


def with_run(report: RunReport, tokenize_seconds: float) -> ColumnElement[Any]:
    """Return the column with the run's part put into it."""
    seconds = report.seconds.model_copy(update={"tokenize": report.seconds.tokenize + tokenize_seconds})
    run = report.model_copy(update={"seconds": seconds}).model_dump(mode="json")
    base = run["base_evaluation"]
    for evaluation in [*run["evaluations"], *([] if base is None else [base])]:
        for answer in evaluation["answers"]:
            # A model may say anything; Postgres stores no NUL.
            answer["answer"] = answer["answer"].replace("\x00", "\ufffd")
    return func.coalesce(Job.report, cast({}, JSONB)).op("||")(cast({"run": run}, JSONB))


def get_tokenize_seconds(job: Job) -> float:
    """Return what prepare took, 0 where that is not known."""
    prepare = (job.report or {}).get("prepare") or {}
    return float(prepare.get("tokenize_seconds", 0.0))
