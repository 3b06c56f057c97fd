"""What clients read of a file's report; documented here, served as it was computed."""

from typing import Literal

from luthier.core.specs import BaseFacts
from luthier.data.reports.file_report import DataReport


class FileReportObject(DataReport):
    """GET /v1/files/{id}/report. Sizes in tokens; rows by line, of a JSON array and Parquet by number."""

    object: Literal["file.report"] = "file.report"
    file_id: str
    sha256: str
    base: str
    base_digest: str
    validation_file: str | None


def file_report_object(
    file_id: str, sha256: str, base: BaseFacts, validation_file_id: str | None, report: DataReport
) -> FileReportObject:
    """Return a file's report as clients see it."""
    return FileReportObject(
        file_id=file_id,
        sha256=sha256,
        base=base.id,
        base_digest=base.digest,
        validation_file=validation_file_id,
        **dict(report),
    )
