"""What clients read of a job's report; documented here, served as it was stored."""

from typing import Any, Literal

from pydantic import BaseModel, Field

from db.tables import Job
from luthier.core.events import RunReport
from services.jobs.reports import PrepareReport


class JobReport(BaseModel):
    """GET /v1/fine_tuning/jobs/{id}/report. A part that is not there yet is null."""

    object: Literal["fine_tuning.job.report"]
    fine_tuning_job_id: str
    prepare: PrepareReport | None = Field(description="What the files held; there once the job is queued.")
    run: RunReport | None = Field(description="What training did; renewed at every evaluation.")


def report_object(job: Job) -> dict[str, Any]:
    """Return a job's report as clients see it: a JobReport, unless an older version of Luthier stored it."""
    parts = job.report or {}
    return {
        "object": "fine_tuning.job.report",
        "fine_tuning_job_id": job.id,
        "prepare": parts.get("prepare"),
        "run": parts.get("run"),
    }
