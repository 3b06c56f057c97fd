"""Prepare: check a job's files for good, count them, put numbers where "auto" stood. No torch, no slot."""

import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import structlog

from db.tables import File, Job
from luthier.bases.catalogue import base_folder
from luthier.bases.fetch import ensure_base
from luthier.core.errors import InvalidTrainingFileError, LuthierError, UnavailableError
from luthier.core.specs import BaseFacts, TrainingSpec
from luthier.core.states import JobStatus
from luthier.data.prepare import prepare_rows
from luthier.data.prepared import PreparedRows, write_prepared
from luthier.data.split import split_rows
from luthier.methods import resolve_spec
from luthier.storage.manifests import seal_folder
from services import events, leases, models
from services.bell import ring_after_commit
from services.events import NewEvent
from services.jobs import MIN_TRAINING_ROWS
from services.leases import Lease, LeaseLostError
from worker.context import WorkerContext
from worker.giving_back import give_back
from worker.keeper import kept_lease

_log = structlog.get_logger()

TRAIN_FILE = "train.safetensors"
VALIDATION_FILE = "validation.safetensors"


@dataclass(frozen=True)
class _Claimed:
    """A job to prepare; its files as storage key and sha256."""

    lease: Lease
    project_id: str
    spec: TrainingSpec
    training: tuple[str, str]
    validation: tuple[str, str] | None


@dataclass(frozen=True)
class _Prepared:
    spec: TrainingSpec
    base: BaseFacts
    prepared_key: str
    report: dict[str, Any]


def prepare(context: WorkerContext, job_id: str) -> None:
    """Prepare one job, if it still waits for that: it ends up `queued`, or `failed` with a reason."""
    claimed = _load(context, job_id)
    if claimed is None:
        return
    try:
        try:
            with kept_lease(context, claimed.lease):
                prepared = _run(context, claimed)
        except (LeaseLostError, UnavailableError):
            raise
        except LuthierError as error:
            with context.database.transaction() as session:
                leases.fail(session, claimed.lease, error)
            return
        _apply(context, claimed.lease, prepared)
    except LeaseLostError:
        _log.info("prepared for nothing, the job is no longer ours", job_id=job_id)
    except UnavailableError as error:
        give_back(context, claimed.lease, JobStatus.VALIDATING_FILES, error)


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
            spec=TrainingSpec.model_validate(job.spec),
            training=(training.storage_key, training.sha256),
            validation=None if validation is None else (validation.storage_key, validation.sha256),
        )


def _run(context: WorkerContext, claimed: _Claimed) -> _Prepared:
    entry = context.catalogue.bases.get(claimed.spec.base_id)
    if entry is None:
        raise LuthierError(f"The base {claimed.spec.base_id} is no longer in this worker's models.toml.")
    base = ensure_base(entry, context.settings.bases_dir, log=lambda line: _log.info("base", stage=line))
    with tempfile.TemporaryDirectory(prefix="luthier-prepare-") as folder:
        return _prepare_files(context, claimed, base, Path(folder))


def _prepare_files(context: WorkerContext, claimed: _Claimed, base: BaseFacts, folder: Path) -> _Prepared:
    options = claimed.spec.training
    max_length = min(options.max_length or base.context_length, base.context_length)
    location = base_folder(context.settings.bases_dir, base.id)

    def read(file: tuple[str, str], purpose: Any) -> tuple[PreparedRows, dict[str, Any]]:
        source = folder / f"{purpose}.jsonl"
        key, sha256 = file
        context.storage.fetch_file(key, source, sha256=sha256)
        rows, found = prepare_rows(
            source, location, max_length=max_length, too_long=options.too_long, purpose=purpose
        )
        return rows, asdict(found)

    train, train_report = read(claimed.training, "training")
    report: dict[str, Any] = {"training": train_report}
    validation: PreparedRows | None = None
    if claimed.validation is not None:
        validation, report["validation"] = read(claimed.validation, "validation")
    elif options.validation_split > 0:
        train, validation = split_rows(train, options.validation_split)
    if train.num_rows < MIN_TRAINING_ROWS:
        raise InvalidTrainingFileError(
            f"Only {train.num_rows} rows are left to train on, and a job needs at least {MIN_TRAINING_ROWS}.",
            param="training_file",
        )
    spec = resolve_spec(
        claimed.spec,
        base=base,
        num_rows=train.num_rows,
        num_tokens=train.num_tokens,
        num_threads=context.num_threads,
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
    return _Prepared(spec, base, key, report)


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
            report=prepared.report,
        )
        dropped = prepared.report["training"].get("num_dropped", 0)
        truncated = prepared.report["training"].get("num_truncated", 0)
        if dropped or truncated:
            told = (
                f"Rows longer than the limit: {truncated} truncated, {dropped} dropped (training.too_long)."
            )
            events.append(session, lease.job_id, [NewEvent(told, level="warn", data={})])
        ring_after_commit(session, context.ring, lease.job_id)
