"""A file's report: what a job would find in its rows, told before the job is made."""

from fastapi import APIRouter, Request

from api.deps import AppStateDep, DetachedPrincipalDep
from api.file_report import report_apart
from api.schemas.files import FileReportObject

router = APIRouter(prefix="/v1/files", tags=["files"])


@router.get("/{file_id}/report")
async def file_report(
    file_id: str,
    request: Request,
    state: AppStateDep,
    principal: DetachedPrincipalDep,
    base: str | None = None,
    validation_file: str | None = None,
) -> FileReportObject:
    """Report on a file's rows with a base's chat template and tokenizer (ours)."""
    return await report_apart(
        state, principal, request, file_id, base=base, validation_file_id=validation_file
    )
