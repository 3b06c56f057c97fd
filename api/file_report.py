"""The report of a file: its rows are read by a separate process, with no session open."""

import asyncio
import threading
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from fastapi import Request
from sqlalchemy.orm import Session

from api.deps import AppState, get_local_base
from api.schemas.files import FileReportObject
from db.tables import File
from luthier.bases.catalogue import base_folder
from luthier.core.errors import (
    ArtifactCorruptError,
    InvalidFilePurposeError,
    InvalidValueError,
    LuthierError,
    MissingParameterError,
    ModelNotAvailableError,
    NotFoundError,
)
from luthier.core.specs import BaseFacts
from luthier.data.reports.process import report_in_process
from services.accounts.auth import Principal
from services.files import files

_LOOK_SECONDS = 1.0
# The report of a file that takes longer covers its first rows only.
_MAX_SECONDS = 60.0


async def report_in_thread(
    state: AppState,
    principal: Principal,
    request: Request,
    file_id: str,
    *,
    base: str | None,
    validation_file_id: str | None,
) -> FileReportObject:
    """Report on a file; nothing is stored.

    Args:
        request: the report is stopped when its client disconnects.
        base: the base whose template and tokenizer are used; the preloaded one when None.

    Raises:
        NotFoundError: when there is no such file.
        InvalidRequestError: when a file holds no rows, or the base is unknown or not on this machine.
        UnavailableError: when reports of other projects take too long.
    """
    is_disconnected = threading.Event()
    work = partial(_report, state, principal, file_id, base, validation_file_id, is_disconnected)
    watcher = asyncio.create_task(_watch(request, is_disconnected))
    try:
        return await state.reports.run_in_thread(principal.project_id, work)
    finally:
        watcher.cancel()


async def _watch(request: Request, is_disconnected: threading.Event) -> None:
    while not await request.is_disconnected():
        await asyncio.sleep(_LOOK_SECONDS)
    is_disconnected.set()


def _report(
    state: AppState,
    principal: Principal,
    file_id: str,
    base: str | None,
    validation_file_id: str | None,
    is_disconnected: threading.Event,
) -> FileReportObject:
    with state.database.transaction() as session:
        file = _find_file(session, principal, file_id, "id")
        validation = None
        if validation_file_id is not None:
            validation = _find_file(session, principal, validation_file_id, "validation_file")
    facts = _find_base(state, base)
    with ExitStack() as stack:
        path = _hold(state, stack, file, "id")
        validation_path = _hold(state, stack, validation, "validation_file") if validation else None
        try:
            report = report_in_process(
                path,
                base_folder(state.settings.bases_dir, facts.id),
                context_length=facts.context_length,
                validation_path=validation_path,
                max_seconds=_MAX_SECONDS,
                is_given_up=is_disconnected.is_set,
            )
        except FileNotFoundError as error:
            # A file was deleted meanwhile, or another one is missing.
            if not path.exists():
                raise _gone(file, "id") from error
            if validation and validation_path and not validation_path.exists():
                raise _gone(validation, "validation_file") from error
            raise
    return FileReportObject(
        file_id=file.id,
        sha256=file.sha256,
        base=facts.id,
        base_digest=facts.digest,
        validation_file=validation_file_id,
        **dict(report),
    )


def _hold(state: AppState, stack: ExitStack, file: File, param: str) -> Path:
    """Return a local path of a file, valid until the stack closes; not a copy where storage is local."""
    try:
        return stack.enter_context(state.storage.local_file(file.storage_key))
    except ArtifactCorruptError as error:
        raise _gone(file, param) from error


def _gone(file: File, param: str) -> LuthierError:
    # 404 is for what the path names.
    kind = NotFoundError if param == "id" else InvalidValueError
    return kind(
        f"The bytes of {file.id} are gone: it was deleted, or the operator must look after storage.",
        param=param,
    )


def _find_file(session: Session, principal: Principal, file_id: str, param: str) -> File:
    try:
        file = files.get(session, principal, file_id, param=param)
    except NotFoundError as error:
        if param == "id":
            raise
        # As for jobs: 404 is for what the path names.
        raise InvalidValueError(error.message, param=param) from error
    if file.purpose != "fine-tune":
        raise InvalidFilePurposeError(
            f"{file.id} has purpose {file.purpose!r}: reports are made of files with purpose 'fine-tune'.",
            param=param,
        )
    return file


def _find_base(state: AppState, base: str | None) -> BaseFacts:
    name = base or state.settings.preload_base
    if not name:
        raise MissingParameterError(
            "base: name the base whose chat template and tokenizer the report shall use; this service has "
            "none that is loaded at start.",
            param="base",
        )
    try:
        entry = state.catalogue.resolve(name)
    except ModelNotAvailableError as error:
        raise ModelNotAvailableError(f"base: {error.message}", param="base") from error
    return get_local_base(state, entry.id, param="base")
