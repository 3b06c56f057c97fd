"""Prepare: check a job's files for good, count them, put numbers where "auto" stood. No torch, no slot."""

import shutil
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import structlog

from db.tables import File, Job
from luthier.bases.catalogue import base_folder
from luthier.core.errors import BaseUnavailableError, InvalidTrainingFileError, LuthierError
from luthier.core.specs import MIN_TRAINING_ROWS, BaseFacts, TrainingSpec
from luthier.core.states import JobStatus
from luthier.data.objectives import Purpose
from luthier.data.prepare import prepare_rows
from luthier.data.prepared import PreparedRows, write_prepared
from luthier.data.prepared_counts import count_prepared
from luthier.data.prompts import check_sample_prompts
from luthier.data.split import split_rows
from luthier.methods import resolve_spec, room_in_context, row_limit
from luthier.storage.manifests import seal_folder
from services import calibrations, events, leases, models, reports
from services.estimates import tell_limit
from services.events import NewEvent
from services.leases import Lease, LeaseLostError
from services.memory_needs import MemoryNeed, tell_need
from services.reports import FileReport, PrepareReport
from worker.bases import ensure_jobs_base
from worker.context import WorkerContext
from worker.giving_back import GIVEN_BACK, full_disk_named, give_back
from worker.keeper import kept_lease
from worker.parents import check_parents
from worker.specs import UnreadableSpecError, read_spec, skip_unreadable

_log = structlog.get_logger()

_MAX_LINES_IN_EVENT = 5

TRAIN_FILE = "train.safetensors"
VALIDATION_FILE = "validation.safetensors"


@dataclass(frozen=True)
class _Input:
    file_id: str
    storage_key: str
    sha256: str

    @classmethod
    def of(cls, file: File) -> "_Input":
        return cls(file.id, file.storage_key, file.sha256)


@dataclass(frozen=True)
class _Claimed:
    """A job to prepare."""

    lease: Lease
    project_id: str
    spec: TrainingSpec
    training: _Input
    validation: _Input | None


@dataclass(frozen=True)
class _Prepared:
    spec: TrainingSpec
    base: BaseFacts
    asked_max_length: int | None
    prepared_key: str
    report: PrepareReport
    need: MemoryNeed


def prepare(context: WorkerContext, job_id: str) -> bool:
    """Prepare one job, if it still waits for that: it ends up `queued`, or `failed` with a reason.

    Returns:
        Whether it is queued now, which nobody else has heard of yet.
    """
    try:
        claimed = _load(context, job_id)
    except UnreadableSpecError as error:
        skip_unreadable(context, error)
        return False
    if claimed is None:
        return False
    # Its imports are done while the files are looked at. A bell that finds nothing to do starts none.
    context.keep_spare()
    try:
        try:
            with full_disk_named(), kept_lease(context, claimed.lease):
                prepared = _run(context, claimed)
        except (LeaseLostError, *GIVEN_BACK):
            raise
        except LuthierError as error:
            with context.database.transaction() as session:
                leases.fail(session, claimed.lease, error)
            return False
        _apply(context, claimed.lease, prepared)
    except LeaseLostError:
        _log.info("prepared for nothing, the job is no longer ours", job_id=job_id)
        return False
    except GIVEN_BACK as error:
        give_back(context, claimed.lease, error)
        return False
    return True


def _load(context: WorkerContext, job_id: str) -> _Claimed | None:
    with context.database.transaction() as session:
        lease = leases.claim_for_preparing(session, job_id, context.worker_id, context.settings.lease_seconds)
        if lease is None:
            return None
        job = session.get_one(Job, job_id)
        training = session.get_one(File, job.training_file_id)
        validation = None if job.validation_file_id is None else session.get_one(File, job.validation_file_id)
        return _Claimed(
            lease=lease,
            project_id=job.project_id,
            spec=read_spec(job),
            training=_Input.of(training),
            validation=None if validation is None else _Input.of(validation),
        )


def _run(context: WorkerContext, claimed: _Claimed) -> _Prepared:
    entry = context.catalogue.bases.get(claimed.spec.base_id)
    if entry is None:
        raise BaseUnavailableError(
            f"The base {claimed.spec.base_id} is no longer in this worker's models.toml."
        )
    base = ensure_jobs_base(context, claimed.lease, entry)
    check_parents(context, claimed.spec, base)
    with tempfile.TemporaryDirectory(prefix="luthier-prepare-") as folder:
        return _prepare_files(context, claimed, base, Path(folder))


def _prepare_files(context: WorkerContext, claimed: _Claimed, base: BaseFacts, folder: Path) -> _Prepared:
    options = claimed.spec.training
    max_length = row_limit(claimed.spec, base)
    location = base_folder(context.settings.bases_dir, base.id)

    check_sample_prompts(options.sample_prompts, location, max_tokens=room_in_context(claimed.spec, base))
    tokenize_seconds = 0.0
    rows_per_example = 1 if claimed.spec.dpo is None else 2

    def read(file: _Input, purpose: Purpose) -> tuple[PreparedRows, FileReport]:
        nonlocal tokenize_seconds
        source = folder / f"{purpose}.rows"
        context.storage.fetch_file(file.storage_key, source, sha256=file.sha256)
        began = time.monotonic()
        rows, found = prepare_rows(
            source,
            location,
            max_length=max_length,
            too_long=options.too_long,
            purpose=purpose,
            with_signatures=purpose == "training" and options.validation_split > 0,
            wants_pairs=claimed.spec.dpo is not None,
        )
        tokenize_seconds += time.monotonic() - began
        return rows, FileReport(file_id=file.file_id, sha256=file.sha256, **asdict(found))

    train, train_report = read(claimed.training, "training")
    validation: PreparedRows | None = None
    validation_report: FileReport | None = None
    if claimed.validation is not None:
        validation, validation_report = read(claimed.validation, "validation")
    elif options.validation_split > 0:
        train, validation = split_rows(train, options.validation_split, rows_per_example=rows_per_example)
    num_examples = train.num_rows // rows_per_example
    if num_examples < MIN_TRAINING_ROWS:
        raise InvalidTrainingFileError(
            f"Only {num_examples} rows are left to train on, and a job needs at least {MIN_TRAINING_ROWS}.",
            param="training_file",
        )
    spec = resolve_spec(
        claimed.spec,
        base=base,
        num_rows=num_examples,
        num_tokens=train.num_tokens,
        num_threads=context.num_threads,
        memory_bytes=context.training_memory_bytes,
    )
    building = folder / "building"
    building.mkdir()
    write_prepared(train, building / TRAIN_FILE)
    if validation is not None:
        write_prepared(validation, building / VALIDATION_FILE)
    seal_folder(building, folder / "prepared", base_digest=base.digest)
    key = f"projects/{claimed.project_id}/jobs/{claimed.lease.job_id}/e{claimed.lease.epoch}/prepared"
    context.storage.put_folder(folder / "prepared", key)
    shutil.rmtree(folder / "prepared")
    report = PrepareReport(
        training=train_report,
        validation=validation_report,
        num_train_rows=num_examples,
        num_validation_rows=0 if validation is None else validation.num_rows // rows_per_example,
        tokenize_seconds=tokenize_seconds,
    )
    need = _tell_need(context, spec, base, train, validation)
    return _Prepared(
        spec=spec,
        base=base,
        asked_max_length=options.max_length,
        prepared_key=key,
        report=report,
        need=need,
    )


def _tell_need(
    context: WorkerContext,
    spec: TrainingSpec,
    base: BaseFacts,
    train: PreparedRows,
    validation: PreparedRows | None,
) -> MemoryNeed:
    with context.database.transaction() as session:
        measured, _ = calibrations.find_measured(
            session, base, spec.training.precision, hostname=context.hostname
        )
    has_pairs = spec.dpo is not None
    return tell_need(
        spec,
        base=base,
        base_folder=base_folder(context.settings.bases_dir, base.id),
        training=count_prepared(train, has_pairs=has_pairs),
        validation=None if validation is None else count_prepared(validation, has_pairs=has_pairs),
        measured=measured,
    )


def _apply(context: WorkerContext, lease: Lease, prepared: _Prepared) -> None:
    with context.database.transaction() as session:
        models.record_base(session, prepared.base)
        leases.leave(
            session,
            lease,
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
        told = [
            _tell_too_long("training", prepared.report.training),
            _tell_too_long("validation", prepared.report.validation),
            tell_limit(prepared.asked_max_length, prepared.spec),
        ]
        found = [NewEvent(one, level="warn", data={}) for one in told if one]
        events.append(session, lease.job_id, found)


def _tell_too_long(purpose: Purpose, rows: FileReport | None) -> str:
    """Return what became of a file's rows that are too long, with the first lines; empty where none is."""
    if rows is None or not (rows.num_dropped or rows.num_truncated):
        return ""
    lines = sorted({*rows.dropped_lines, *rows.truncated_lines})[:_MAX_LINES_IN_EVENT]
    more = ", …" if rows.num_dropped + rows.num_truncated > len(lines) else ""
    return (
        f"Rows of the {purpose} file longer than the limit: {rows.num_truncated} truncated, "
        f"{rows.num_dropped} dropped (training.too_long); line {', '.join(map(str, lines))}{more}."
    )
