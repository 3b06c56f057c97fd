"""The prepare task: checks and tokenises a job's files and resolves "auto". No torch, no training slot."""

import contextlib
import os
import selectors
import signal
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec

from db.tables import File, Job
from luthier.bases.catalogue import base_folder
from luthier.core.errors import (
    BaseUnavailableError,
    StalledError,
    WorkerCrashedError,
    make_job_error,
)
from luthier.core.runtime import bare_environment, tied_python
from luthier.core.shapes import read_shape
from luthier.core.specs import BaseFacts, TrainingSpec
from luthier.core.states import JobStatus
from luthier.data.prepare.objectives import Purpose
from luthier.data.prepare.preparation import RowLimits
from luthier.data.prepare.process import (
    ANSWER_NAME,
    QUESTION_NAME,
    ROWS_FOLDER,
    Answer,
    Prepared,
    Question,
    out_of_memory,
)
from luthier.data.prepare.sample_prompts import check_sample_prompts
from luthier.methods._tuning import resolve_spec, room_in_context, row_limit
from luthier.storage.manifests import seal_folder
from services.capacity.estimates import MemoryNeed, limit_warning, need_memory
from services.jobs import events, leases, reports
from services.jobs.events import NewEvent
from services.jobs.leases import Lease
from services.jobs.reports import FileReport, PrepareReport
from services.models import models
from worker.attempt import attempt
from worker.context import WorkerContext, remove_run_dir
from worker.heartbeat import LeaseHeartbeat, StallTimer
from worker.speed import known_speed
from worker.tasks.model_inputs import (
    UnreadableSpecError,
    check_parents,
    ensure_jobs_base,
    read_spec,
    skip_unreadable,
)

_MAX_LINES_IN_EVENT = 5
_LOOK_SECONDS = 0.5
_LOG_NAME = "prepare.log"
_READ_BYTES = 4096


@dataclass(frozen=True)
class _Input:
    file_id: str
    storage_key: str
    sha256: str


@dataclass(frozen=True)
class _Claimed:
    """A job to prepare; `files` has the training file, and maybe a validation file."""

    lease: Lease
    project_id: str
    spec: TrainingSpec
    files: dict[Purpose, _Input]


@dataclass(frozen=True)
class _Prepared:
    spec: TrainingSpec
    base: BaseFacts
    prepared_key: str
    report: PrepareReport
    need: MemoryNeed


def prepare(context: WorkerContext, job_id: str) -> bool:
    """Prepare one job, if it still waits for that: it ends up `queued`, or `failed` with a reason."""
    try:
        claimed = _load(context, job_id)
    except UnreadableSpecError as error:
        skip_unreadable(context, error)
        return False
    if claimed is None:
        return False
    # Its imports run while the files are checked.
    context.start_fork_server()
    with attempt(context, claimed.lease) as heartbeat:
        return _prepare(context, claimed, heartbeat)
    return False


def _prepare(context: WorkerContext, claimed: _Claimed, heartbeat: LeaseHeartbeat) -> bool:
    try:
        prepared = _run(context, claimed, heartbeat)
    except StoppedError:
        event = NewEvent("The worker is stopping; the job's files are checked by another", data={})
        with context.database.transaction() as session:
            leases.wait_again(session, claimed.lease, outcome="given_back", event=event)
        return False
    except (StalledError, WorkerCrashedError) as error:
        with context.database.transaction() as session:
            leases.retry_or_fail(
                session,
                claimed.lease,
                error,
                max_attempts=context.settings.max_attempts,
                pause_seconds=context.settings.sweep_seconds,
            )
        return False
    _apply(context, claimed, prepared)
    return True


def _load(context: WorkerContext, job_id: str) -> _Claimed | None:
    with context.database.transaction() as session:
        lease = leases.claim_for_preparing(session, job_id, context.worker_id, context.settings.lease_seconds)
        if lease is None:
            return None
        job = session.get_one(Job, job_id)
        ids: dict[Purpose, str | None] = {
            "training": job.training_file_id,
            "validation": job.validation_file_id,
        }
        files = {purpose: session.get_one(File, file_id) for purpose, file_id in ids.items() if file_id}
        return _Claimed(
            lease=lease,
            project_id=job.project_id,
            spec=read_spec(job),
            files={
                purpose: _Input(file.id, file.storage_key, file.sha256) for purpose, file in files.items()
            },
        )


def _run(context: WorkerContext, claimed: _Claimed, heartbeat: LeaseHeartbeat) -> _Prepared:
    entry = context.catalogue.bases.get(claimed.spec.base_id)
    if entry is None:
        raise BaseUnavailableError(
            f"The base {claimed.spec.base_id} is no longer in this worker's models.toml."
        )
    base = ensure_jobs_base(context, claimed.lease, entry)
    check_parents(context, claimed.spec, base)
    folder = context.run_dir(claimed.lease)
    folder.mkdir(parents=True)
    try:
        return _prepare_files(context, claimed, heartbeat, base, folder)
    finally:
        remove_run_dir(folder)


def _prepare_files(
    context: WorkerContext, claimed: _Claimed, heartbeat: LeaseHeartbeat, base: BaseFacts, folder: Path
) -> _Prepared:
    settings, options = context.settings, claimed.spec.training
    location = base_folder(settings.bases_dir.absolute(), base.id)
    check_sample_prompts(options.sample_prompts, location, max_tokens=room_in_context(claimed.spec, base))
    for purpose, file in claimed.files.items():
        context.storage.fetch_file(file.storage_key, folder / purpose, sha256=file.sha256)
        heartbeat.check()
    found = run_prepare(
        context,
        heartbeat,
        folder,
        Question(
            base_folder=str(location),
            max_length=row_limit(claimed.spec, base),
            too_long=options.too_long,
            has_pairs=claimed.spec.dpo is not None,
            validation_split=options.validation_split,
            has_validation_file="validation" in claimed.files,
            limits=RowLimits(settings.max_training_rows, settings.max_training_tokens),
            max_memory_bytes=settings.max_prepare_bytes,
        ),
    )
    spec = resolve_spec(
        claimed.spec,
        base=base,
        num_rows=found.num_train_rows,
        num_tokens=found.num_train_tokens,
        num_threads=context.num_threads,
        memory_bytes=context.training_memory_bytes,
    )
    seal_folder(folder / ROWS_FOLDER, folder / "prepared", base_digest=base.digest)
    heartbeat.check()
    key = f"projects/{claimed.project_id}/jobs/{claimed.lease.job_id}/e{claimed.lease.fencing_token}/prepared"
    context.storage.put_folder(folder / "prepared", key)
    file_reports: dict[str, Any] = {
        purpose: FileReport(file_id=file.file_id, sha256=file.sha256, **asdict(rows))
        for purpose, file in claimed.files.items()
        if (rows := getattr(found, purpose)) is not None
    }
    report = PrepareReport(
        **file_reports,
        num_train_rows=found.num_train_rows,
        num_validation_rows=found.num_validation_rows,
        tokenize_seconds=found.tokenize_seconds,
    )
    return _Prepared(
        spec=spec,
        base=base,
        prepared_key=key,
        report=report,
        need=_need_memory(context, spec, base, found.training.longest_tokens),
    )


def _need_memory(context: WorkerContext, spec: TrainingSpec, base: BaseFacts, longest: int) -> MemoryNeed:
    speed = known_speed(context)
    device = speed.device if speed else "cuda" if context.settings.device == "cuda" else "cpu"
    precision = spec.training.precision
    if precision == "auto":
        precision = speed.precision if speed else "float32"  # type: ignore[assignment]
    return need_memory(
        spec,
        base=base,
        shape=read_shape(base_folder(context.settings.bases_dir, base.id)),
        longest=longest,
        device=device,
        precision=precision,
    )


def _apply(context: WorkerContext, claimed: _Claimed, prepared: _Prepared) -> None:
    with context.database.transaction() as session:
        models.record_base(session, prepared.base)
        leases.leave(
            session,
            claimed.lease,
            JobStatus.QUEUED,
            outcome="prepared",
            event=NewEvent("Files validated, moving job to queued state", data={}),
            spec=prepared.spec.model_dump(mode="json"),
            prepared_key=prepared.prepared_key,
            **leases.PROGRESS,
            report=reports.with_prepare(prepared.report),
            peak_bytes=prepared.need.peak_bytes,
            least_bytes=prepared.need.least_bytes,
        )
        warnings = [
            _too_long_warning("training", prepared.report.training),
            _too_long_warning("validation", prepared.report.validation),
            limit_warning(claimed.spec.training.max_length, prepared.spec),
        ]
        found = [NewEvent(one, level="warn", data={}) for one in warnings if one]
        events.append(session, claimed.lease.job_id, found)


def _too_long_warning(purpose: Purpose, rows: FileReport | None) -> str:
    """Return what became of a file's rows that are too long, with the first lines; empty where none is."""
    if rows is None or not (rows.num_dropped or rows.num_truncated):
        return ""
    lines = sorted({*rows.dropped_lines, *rows.truncated_lines})[:_MAX_LINES_IN_EVENT]
    more = ", …" if rows.num_dropped + rows.num_truncated > len(lines) else ""
    return (
        f"Rows of the {purpose} file longer than the limit: {rows.num_truncated} truncated, "
        f"{rows.num_dropped} dropped (training.too_long); line {', '.join(map(str, lines))}{more}."
    )


class StoppedError(Exception):
    """The worker stops, and the check with it: another worker begins it again."""


def run_prepare(
    context: WorkerContext, heartbeat: LeaseHeartbeat, folder: Path, question: Question
) -> Prepared:
    """Prepare the files in a folder; from the main thread, to which the kernel ties the process's life.

    Raises:
        JobError: when the files can't be used, or take too much memory.
        StalledError: when it made no progress for too long.
        WorkerCrashedError: when the process ended without an answer.
        StoppedError: when the worker stops.
    """
    (folder / QUESTION_NAME).write_bytes(msgspec.json.encode(question))
    with (folder / _LOG_NAME).open("ab") as log:
        process = subprocess.Popen(
            tied_python("-m", "luthier.data.prepare.process", str(folder)),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            env=bare_environment() | {"OPENBLAS_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            start_new_session=True,
        )
    try:
        _follow(context, heartbeat, process)
        exit_code = process.wait()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
    if exit_code == -signal.SIGABRT:
        # How a library that is not Python's ends where it gets no memory.
        raise out_of_memory(question.max_memory_bytes)
    if exit_code != 0:
        raise WorkerCrashedError(f"The process that checks the job's files ended with exit code {exit_code}.")
    answer = msgspec.json.decode((folder / ANSWER_NAME).read_bytes(), type=Answer)
    if answer.failure is not None:
        raise make_job_error(answer.failure.code, answer.failure.message, answer.failure.param)
    assert answer.prepared is not None
    return answer.prepared


def _follow(context: WorkerContext, heartbeat: LeaseHeartbeat, process: "subprocess.Popen[bytes]") -> None:
    """Return once the process has closed its output."""
    assert process.stdout is not None
    timer = StallTimer(context.settings.stall_seconds)
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            if selector.select(_LOOK_SECONDS):
                if not os.read(process.stdout.fileno(), _READ_BYTES):
                    return
                timer.note_progress(time.monotonic())
            heartbeat.check()
            if context.stopping.is_set():
                raise StoppedError
            if timer.is_over(time.monotonic()):
                raise StalledError(
                    f"The check of the job's files made no progress for {timer.limit_seconds:.0f} s and was "
                    "ended (LUTHIER_STALL_SECONDS)."
                )
