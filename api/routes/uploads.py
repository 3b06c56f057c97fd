"""Uploads: large files in parts. Create, add parts, complete, cancel; retrieve is ours."""

from fastapi import APIRouter, Request
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from api.deps import AppState, AppStateDep, DetachedPrincipalDep, PrincipalDep, SessionDep, run_in_transaction
from api.schemas.files import (
    CompleteUploadBody,
    CreateUploadBody,
    UploadObject,
    UploadPartObject,
)
from api.uploads.multipart import form_body
from api.uploads.object_writer import discard_rest
from api.uploads.part_upload import assemble, receive_part
from api.uploads.upload_records import delete_stored, record_stored
from db.tables import File, UploadPart
from luthier.core.errors import ArtifactCorruptError, LuthierError
from luthier.core.ids import new_id
from luthier.data.readers.upload_check import UploadCheck, row_limits
from services.accounts import limits
from services.accounts.auth import Principal
from services.files import uploads
from services.files.files import StoredFile
from services.files.uploads import Assembly, storage_prefix

router = APIRouter(prefix="/v1/uploads", tags=["uploads"])
_PART_FORM = form_body(["data"], {"data": {"type": "string", "format": "binary"}})


@router.post("")
def create_upload(
    body: CreateUploadBody, session: SessionDep, principal: PrincipalDep, state: AppStateDep
) -> UploadObject:
    """Begin a file that is sent in parts; it waits for them for an hour."""
    new = body.to_new_upload(state.settings.max_large_upload_bytes)
    settings, project_id = state.settings, principal.project_id
    state.storage.check_free(settings.min_free_bytes)
    limits.check_open_uploads(session, project_id, settings.max_running_uploads_per_project)
    limits.check_stored_bytes(
        session, project_id, settings.max_stored_bytes_per_project, num_new_bytes=new.num_bytes
    )
    return UploadObject.of_upload(uploads.create(session, principal, new))


@router.get("/{upload_id}")
def retrieve_upload(upload_id: str, session: SessionDep, principal: PrincipalDep) -> UploadObject:
    """Describe one upload."""
    upload = uploads.get(session, principal, upload_id)
    return UploadObject.of_upload(upload, uploads.find_file(session, upload))


@router.post("/{upload_id}/parts", openapi_extra=_PART_FORM)
async def create_part(
    upload_id: str, request: Request, state: AppStateDep, principal: DetachedPrincipalDep
) -> UploadPartObject:
    """Add a part (multipart: `data`, at most 64 MiB); parts may come at the same time, in any order."""
    try:
        await run_in_transaction(state, uploads.get_open, principal, upload_id)
        await run_in_threadpool(state.storage.check_free, state.settings.min_free_bytes)
    except LuthierError:
        await discard_rest(request.stream())
        raise
    part_id = new_id("upload_part")
    storage_key = f"{storage_prefix(principal.project_id, upload_id)}/{part_id}"
    stored = await receive_part(request, state.storage, part_id=part_id, storage_key=storage_key)

    def record(session: Session) -> UploadPartObject:
        return UploadPartObject.of(uploads.record_part(session, principal, upload_id, stored))

    return await record_stored(state, storage_key, record, UploadPart, part_id)


async def _start(state: AppState, principal: Principal, upload_id: str, body: CompleteUploadBody) -> Assembly:
    await run_in_threadpool(state.storage.check_free, state.settings.min_free_bytes)
    return await run_in_transaction(
        state, uploads.start_completing, principal, upload_id, part_ids=body.part_ids, md5=body.md5
    )


async def _assemble(
    state: AppState, principal: Principal, assembly: Assembly, file_id: str, storage_key: str, md5: str | None
) -> StoredFile:
    """Join an upload's parts under the file's key."""
    upload = assembly.upload
    check = UploadCheck(
        upload.purpose, row_limits(state.settings), lambda: state.checks.hold(principal.project_id)
    )
    facts = await assemble(state.storage, assembly.parts, check=check, md5=md5, storage_key=storage_key)
    return StoredFile(
        id=file_id,
        filename=upload.filename,
        purpose=upload.purpose,
        storage_key=storage_key,
        expires_after_seconds=upload.file_expires_after_seconds,
        **facts._asdict(),
    )


@router.post("/{upload_id}/complete")
async def complete_upload(
    upload_id: str, body: CompleteUploadBody, state: AppStateDep, principal: DetachedPrincipalDep
) -> UploadObject:
    """Make the parts a file, checked line by line; the same complete sent again answers the same file."""
    assembly = await _start(state, principal, upload_id, body)
    if assembly.is_done:
        return UploadObject.of_upload(assembly.upload, assembly.file)
    file_id = new_id("file")
    storage_key = f"{storage_prefix(principal.project_id, upload_id)}/{file_id}"
    try:
        stored = await _assemble(state, principal, assembly, file_id, storage_key, body.md5)
    except ArtifactCorruptError:
        # The same request, sent twice, may have completed first and deleted the parts.
        assembly = await _start(state, principal, upload_id, body)
        if not assembly.is_done:
            raise
        return UploadObject.of_upload(assembly.upload, assembly.file)

    def finish(session: Session) -> UploadObject:
        upload, file = uploads.finish_completing(
            session, principal, upload_id, stored, part_ids=body.part_ids, md5=body.md5
        )
        return UploadObject.of_upload(upload, file)

    answer = await record_stored(state, storage_key, finish, File, file_id)
    is_ours = answer.file is not None and answer.file.id == file_id
    await delete_stored(state, [part.storage_key for part in assembly.parts] if is_ours else [storage_key])
    return answer


@router.post("/{upload_id}/cancel")
async def cancel_upload(upload_id: str, state: AppStateDep, principal: DetachedPrincipalDep) -> UploadObject:
    """End an upload; its parts are deleted, and it takes no more."""
    upload, keys = await run_in_transaction(state, uploads.cancel, principal, upload_id)
    await delete_stored(state, keys)
    return UploadObject.of_upload(upload)
