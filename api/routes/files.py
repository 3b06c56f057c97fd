"""Files: upload, list, retrieve, content, delete."""

from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from api.deps import AppStateDep, DetachedPrincipalDep, PrincipalDep, SessionDep, run_in_transaction
from api.file_report import report_in_thread
from api.schemas.base import DeletedObject, ListPage, list_object
from api.schemas.files import FileObject, FileReportObject
from api.streaming.byte_ranges import BYTES_ANSWER, stored_bytes
from api.uploads.file_upload import MAX_EXPIRES_AFTER_SECONDS, MIN_EXPIRES_AFTER_SECONDS, receive_file
from api.uploads.multipart import form_body
from api.uploads.object_writer import discard_rest
from api.uploads.upload_records import delete_stored, record_stored
from db.tables import File
from luthier.core.errors import LuthierError
from luthier.core.ids import new_id
from luthier.data.readers.upload_check import INPUT_PURPOSES
from services.accounts import limits
from services.files import files

router = APIRouter(prefix="/v1/files", tags=["files"])
_FORM = form_body(
    ["purpose", "file"],
    {
        "purpose": {"type": "string", "enum": list(INPUT_PURPOSES)},
        "file": {"type": "string", "format": "binary"},
        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
        "expires_after[seconds]": {
            "type": "integer",
            "minimum": MIN_EXPIRES_AFTER_SECONDS,
            "maximum": MAX_EXPIRES_AFTER_SECONDS,
        },
    },
)


@router.post("", openapi_extra=_FORM)
async def create_file(request: Request, state: AppStateDep, principal: DetachedPrincipalDep) -> FileObject:
    """Upload a file (multipart: `purpose` and `file`); a line that breaks the format is refused by number."""
    file_id = new_id("file")
    storage_key = f"projects/{principal.project_id}/files/{file_id}"

    def check_room(session: Session, num_new_bytes: int = 1) -> None:
        limit = state.settings.max_stored_bytes_per_project
        limits.check_stored_bytes(session, principal.project_id, limit, num_new_bytes=num_new_bytes)

    def record(session: Session) -> FileObject:
        check_room(session, stored.num_bytes)
        return FileObject.of(files.record(session, principal, stored))

    try:
        await run_in_threadpool(state.storage.check_free, state.settings.min_free_bytes)
        await run_in_transaction(state, check_room)
    except LuthierError:
        await discard_rest(request.stream())
        raise
    stored = await receive_file(
        request,
        state.storage,
        state.settings,
        lambda: state.checks.hold(principal.project_id),
        file_id=file_id,
        storage_key=storage_key,
    )
    return await record_stored(state, storage_key, record, File, file_id)


@router.get("")
def list_files(
    session: SessionDep,
    principal: PrincipalDep,
    after: str | None = None,
    limit: Annotated[int, Query(ge=0, le=10000)] = 10000,
    order: Literal["asc", "desc"] = "desc",
    purpose: str | None = None,
) -> ListPage[FileObject]:
    """List the project's files, newest first unless asked otherwise."""
    rows, has_more = files.list_(
        session, principal, after=after, limit=limit, is_ascending=order == "asc", purpose=purpose
    )
    return list_object([FileObject.of(row) for row in rows], has_more=has_more, with_ids=True)


@router.get("/{file_id}")
def retrieve_file(file_id: str, session: SessionDep, principal: PrincipalDep) -> FileObject:
    """Describe one file."""
    return FileObject.of(files.get(session, principal, file_id))


@router.head("/{file_id}/content", include_in_schema=False)
@router.get("/{file_id}/content", response_class=Response, responses=BYTES_ANSWER)
async def file_content(
    file_id: str, request: Request, state: AppStateDep, principal: DetachedPrincipalDep
) -> Response:
    """Send a file's bytes as they were uploaded, whole or a range of them."""
    row = await run_in_transaction(state, files.get, principal, file_id)
    return await stored_bytes(
        request,
        state.storage,
        row.storage_key,
        size_bytes=row.num_bytes,
        sha256=row.sha256,
        filename=row.filename,
    )


@router.delete("/{file_id}")
async def delete_file(file_id: str, state: AppStateDep, principal: DetachedPrincipalDep) -> DeletedObject:
    """Delete a file, its bytes included, unless an unfinished job reads it."""
    row = await run_in_transaction(state, files.delete, principal, file_id)
    await delete_stored(state, [row.storage_key])
    return {"id": file_id, "object": "file", "deleted": True}


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
    return await report_in_thread(
        state, principal, request, file_id, base=base, validation_file_id=validation_file
    )
