"""Train: claim a queued job, run the training process over a run directory, publish what it makes.

Load, run, apply: a claim in one short transaction, a run with no session open, and every result written
under the claim's fence. A job that is requeued resumes from its newest save point.
"""

import secrets
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import structlog
from pydantic import ValidationError

from db.tables import Organization
from luthier.bases.catalogue import base_folder
from luthier.core.devices import Device
from luthier.core.errors import (
    ArtifactCorruptError,
    BaseUnavailableError,
    OutOfMemoryError,
    UnavailableError,
)
from luthier.core.inference import HEADER_TOKEN, LOANS_PATH, LoanRequest, MemoryLoan
from luthier.core.specs import RunInputs, TrainingSpec
from luthier.data.prepare.process import TRAIN_FILE, VALIDATION_FILE
from services.capacity import memory
from services.capacity.memory import Waiting
from services.jobs import leases, reports
from services.jobs.leases import Lease
from services.models import models
from worker.attempt import attempt
from worker.context import WorkerContext, remove_run_dir
from worker.heartbeat import LeaseHeartbeat
from worker.quarantine import may_claim
from worker.tasks.model_inputs import (
    UnreadableSpecError,
    ensure_jobs_base,
    fetch_parents,
    read_spec,
    skip_unreadable,
)
from worker.training_process.child import start_child
from worker.training_process.event_buffer import EventBuffer
from worker.training_process.publish import Publisher
from worker.training_process.supervisor import Ending, TrainingRun
from worker.training_process.tracking import Tracking, start_tracking

_log = structlog.get_logger()
_CONNECT_SECONDS = 1.0
# Giving back waits for the step that runs.
_READ_SECONDS = 5.0
_LOCAL_ORIGIN = "http://inference"
# In leases: how long a loan is kept that its worker is slow to repeat.
_LEASES = 4


class Loan:
    """A loan of one server, repeated in a thread until it is ended."""

    def __init__(self, context: WorkerContext, url: str, job_id: str, request: LoanRequest) -> None:
        self._context, self._url, self._request = context, url, request
        self.job_id, self.num_bytes = job_id, request.num_bytes
        self._is_ended = threading.Event()
        self._keeping = threading.Thread(target=self._keep, daemon=True)
        self._keeping.start()

    def end(self) -> None:
        self._is_ended.set()
        self._keeping.join()
        _ask(self._context, self._url, self._request.model_copy(update={"num_bytes": 0, "least_bytes": 0}))

    def _keep(self) -> None:
        while not self._is_ended.wait(self._context.settings.heartbeat_seconds):
            _ask(self._context, self._url, self._request)


@dataclass(frozen=True)
class Claimed:
    """A job under this attempt's lease, and what its run needs."""

    lease: Lease
    project_id: str
    spec: TrainingSpec
    model_name: str
    prepared_key: str
    save_points: list[dict[str, object]]
    tokenize_seconds: float
    integrations: list[dict[str, Any]]
    # Why no device has room for it, however long it waits.
    refusal: OutOfMemoryError | None = None
    # What serving lent it.
    loan: Loan | None = None

    @property
    def prefix(self) -> str:
        """Storage prefix of this attempt: the fencing token separates it from those of stale workers."""
        return f"projects/{self.project_id}/jobs/{self.lease.job_id}/e{self.lease.fencing_token}"


def train(context: WorkerContext, claimed: Claimed) -> None:
    log = _log.bind(job_id=claimed.lease.job_id, epoch=claimed.lease.fencing_token)
    run_dir = context.run_dir(claimed.lease)
    tracking = start_tracking(context, claimed.lease, claimed.project_id, claimed.spec, claimed.integrations)
    try:
        with attempt(context, claimed.lease) as heartbeat:
            ending = _run(context, claimed, run_dir, heartbeat, tracking)
            log.info("attempt ended", ending=ending.value)
    finally:
        tracking.end()
        _release_memory(context, claimed.lease, claimed.loan)
        remove_run_dir(run_dir)


def claim(context: WorkerContext) -> Claimed | None:
    """Take the queued job in turn; None when none fits, none waits or no slot is free.

    Each try is one short transaction. Between two of them serving is asked for what a job lacks.
    """
    if not may_claim(context):
        return None
    claimed, waiting = _try_to_claim(context, None, is_final=False)
    if waiting is None or context.device is None:
        return claimed
    loan = borrow(context, context.device, waiting)
    try:
        claimed, waiting = _try_to_claim(context, loan, is_final=True)
        if waiting is not None:
            with context.database.transaction() as session:
                memory.note_waiting(session, context.device, waiting)
    finally:
        # Another may have taken the job meanwhile.
        if loan is not None and (claimed is None or claimed.loan is None):
            loan.end()
    return claimed


def _try_to_claim(
    context: WorkerContext, loan: Loan | None, *, is_final: bool
) -> tuple[Claimed | None, Waiting | None]:
    """Claim a job, or return the first one that waits for memory."""
    while True:
        try:
            return _try_once(context, loan, is_final=is_final)
        except UnreadableSpecError as error:
            skip_unreadable(context, error)


def _try_once(
    context: WorkerContext, loan: Loan | None, *, is_final: bool
) -> tuple[Claimed | None, Waiting | None]:
    settings, device = context.settings, context.device
    waiting: list[Waiting] = []
    with context.database.transaction() as session:
        taken = leases.claim_for_training(
            session,
            context.worker_id,
            settings.training_slots,
            settings.lease_seconds,
            device=device,
            lent=("", 0) if loan is None else (loan.job_id, loan.num_bytes),
            is_final=is_final,
            on_wait=waiting.append,
            can_run=context.can_run(),
        )
        if taken is None:
            return None, waiting[0] if waiting else None
        lease, job = taken
        organization = session.get_one(Organization, job.organization_id)
        assert job.prepared_key is not None, "a queued job has been prepared"
        made = Claimed(
            lease=lease,
            project_id=job.project_id,
            spec=read_spec(job),
            model_name=models.make_name(job.base_id, organization.slug, job.suffix),
            prepared_key=job.prepared_key,
            save_points=list(job.save_points),
            tokenize_seconds=reports.get_tokenize_seconds(job),
            integrations=list(job.integrations or []),
            refusal=None if device is None else memory.find_refusal(job, device),
            loan=loan if loan is not None and loan.job_id == job.id else None,
        )
        return made, None


def _release_memory(context: WorkerContext, lease: Lease, loan: Loan | None) -> None:
    """End the attempt's grant and loan, now that its process is gone."""
    if loan is not None:
        loan.end()
    try:
        with context.database.transaction() as session:
            memory.release(session, lease.job_id, lease.fencing_token)
    except UnavailableError:
        _log.warning("memory not released, its grant lapses", job_id=lease.job_id)


def _run(
    context: WorkerContext, claimed: Claimed, run_dir: Path, heartbeat: LeaseHeartbeat, tracking: Tracking
) -> Ending:
    if claimed.refusal is not None:
        raise claimed.refusal
    _fill_run_directory(context, claimed, run_dir)
    heartbeat.check()
    assert claimed.spec.num_threads is not None
    with start_child(run_dir, claimed.spec.num_threads, context.fork_server) as child:
        # Bytes may be on their way into storage when a job is cancelled: its process ends all the same.
        heartbeat.on_lost = child.kill_group
        heartbeat.on_pause = child.ask_to_stop
        return make_run(context, claimed, run_dir, heartbeat, tracking).supervise(child)


def make_run(
    context: WorkerContext,
    claimed: Claimed,
    run_dir: Path,
    heartbeat: LeaseHeartbeat,
    tracking: Tracking | None = None,
) -> TrainingRun:
    """Return an attempt whose process is yet to be followed."""
    event_buffer = EventBuffer(context.database, claimed.lease, heartbeat)
    publisher = Publisher(
        storage=context.storage,
        event_buffer=event_buffer,
        lease=claimed.lease,
        spec=claimed.spec,
        model_name=claimed.model_name,
        prefix=claimed.prefix,
        run_dir=run_dir,
        tokenize_seconds=claimed.tokenize_seconds,
    )
    return TrainingRun(context, claimed.lease, heartbeat, event_buffer, publisher, tracking)


def _fill_run_directory(context: WorkerContext, claimed: Claimed, run_dir: Path) -> None:
    """Lay out what the training process reads: spec, inputs, parents, rows, the newest whole save point."""
    base = claimed.spec.base
    assert base is not None, "a queued job has a resolved spec"
    entry = context.catalogue.bases.get(base.id)
    if entry is None:
        raise BaseUnavailableError(f"The base {base.id} is not in this worker's models.toml.")
    here = ensure_jobs_base(context, claimed.lease, entry)
    if here.digest != base.digest:
        raise BaseUnavailableError(
            f"This worker's copy of {base.id} is {here.digest}, the job was prepared for {base.digest}."
        )
    shutil.rmtree(run_dir, ignore_errors=True)
    run_dir.mkdir(parents=True)
    inputs = RunInputs(
        job_id=claimed.lease.job_id,
        model_name=claimed.model_name,
        base_path=str(base_folder(context.settings.bases_dir.absolute(), base.id)),
        device=context.settings.device,
        **fetch_parents(context, claimed.spec, run_dir),
    )
    (run_dir / "spec.json").write_text(claimed.spec.model_dump_json())
    (run_dir / "inputs.json").write_text(inputs.model_dump_json())
    prepared = context.storage.fetch_folder(claimed.prepared_key, run_dir / "prepared")
    for name in (TRAIN_FILE, VALIDATION_FILE):
        if name in prepared.files:
            (run_dir / "prepared" / name).rename(run_dir / name)
    _fetch_save_point(context, claimed, run_dir)


def _fetch_save_point(context: WorkerContext, claimed: Claimed, run_dir: Path) -> None:
    for save_point in reversed(claimed.save_points):
        key, step = str(save_point["key"]), int(str(save_point["step"]))
        destination = run_dir / "save_points" / f"step-{step:06d}"
        destination.parent.mkdir(exist_ok=True)
        try:
            context.storage.fetch_folder(key, destination)
            return
        except ArtifactCorruptError as error:
            _log.warning("save point skipped", key=key, error=error.message)


def borrow(context: WorkerContext, device: Device, waiting: Waiting) -> Loan | None:
    """Ask the inference servers of this device for what a job lacks; None where none lends enough of it."""
    for url in context.settings.inference_urls:
        request = LoanRequest(
            # A Unix socket leads to this machine; over TCP it may be another.
            hostname=None if url.startswith("unix://") else device.hostname,
            device=device.name,
            # Another worker may ask for the same job.
            loan_id=f"{waiting.job_id}-{secrets.token_hex(4)}",
            num_bytes=waiting.missing_bytes,
            least_bytes=waiting.least_bytes,
            seconds=_LEASES * context.settings.lease_seconds,
        )
        lent_bytes = _ask(context, url, request)
        if lent_bytes:
            kept = request.model_copy(update={"num_bytes": lent_bytes, "least_bytes": 0})
            return Loan(context, url, waiting.job_id, kept)
    return None


def _ask(context: WorkerContext, url: str, request: LoanRequest) -> int:
    """Return the bytes that a server lends; none where it can't be asked."""
    is_local = url.startswith("unix://")
    token = context.settings.internal_token.get_secret_value()
    try:
        with httpx2.Client(
            transport=httpx2.HTTPTransport(uds=url.removeprefix("unix://") if is_local else None),
            base_url=_LOCAL_ORIGIN if is_local else url,
            headers={} if is_local else {HEADER_TOKEN: token},
            timeout=httpx2.Timeout(_READ_SECONDS, connect=_CONNECT_SECONDS),
        ) as client:
            answer = client.post(LOANS_PATH, json=request.model_dump()).raise_for_status()
            return MemoryLoan.model_validate_json(answer.content).lent_bytes
    except (httpx2.HTTPError, ValidationError) as error:
        # Not started, or just restarting, or of another make: it lends nothing.
        _log.debug("no memory can be borrowed", url=url, reason=type(error).__name__)
        return 0
