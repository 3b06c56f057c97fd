"""Memory of training, with real PostgreSQL: what a job is given of a device, and what waiting jobs say."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from sqlalchemy import delete, select

from db.session import Database
from db.tables import MemoryGrant, Worker
from luthier.core.devices import Device
from services.capacity import memory
from services.jobs import leases
from services.jobs.leases import Lease
from tests.conftest import wait_until
from tests.training import Jobs, train_next
from worker.app import sweep
from worker.context import Watch, WorkerContext
from worker.tasks.train import claim

_GB = 1_000_000_000
DEVICE = Device("here", "cpu", training_bytes=10 * _GB, serving_bytes=5 * _GB)


@pytest.fixture
def context(context: WorkerContext) -> WorkerContext:
    with context.database.transaction() as session:
        # This machine's own device, from the worker's first sweep.
        session.execute(delete(Worker))
    return replace(context, device=DEVICE)


def queue(jobs: Jobs, *sizes: float, least: float | None = None) -> list[str]:
    """Prepare jobs that need a number of GB, a margin included."""
    file_id = jobs.upload()
    made = []
    for size in sizes:
        job_id = jobs.prepared(file_id=file_id)
        peak = round(size * _GB / memory.MARGIN) + 1
        least_bytes = peak if least is None else round(least * _GB)
        jobs.change(job_id, peak_bytes=peak, least_bytes=least_bytes)
        made.append(job_id)
    return made


def _claim(
    database: Database, worker_id: str = "w", device: Device = DEVICE, *, seconds: float = 30
) -> Lease | None:
    with database.transaction() as session:
        taken = leases.claim_for_training(session, worker_id, 8, seconds, device=device)
        return None if taken is None else taken[0]


def _release(database: Database, lease: Lease) -> None:
    with database.transaction() as session:
        leases.leave(session, lease, leases.JobStatus.FAILED, outcome="failed")
        memory.release(session, lease.job_id, lease.fencing_token)


def held(database: Database) -> dict[str, int]:
    with database.transaction() as session:
        return {row.job_id: row.num_bytes for row in session.scalars(select(MemoryGrant))}


def waits(jobs: Jobs, job_id: str) -> list[str]:
    return [message for message in jobs.messages(job_id) if message.startswith("The job waits for")]


def test_of_two_that_ask_at_once_for_the_last_bytes_one_gets_them(jobs: Jobs, context: WorkerContext) -> None:
    database, rounds = context.database, 4
    queue(jobs, *[6.0] * (rounds + 1))
    for _ in range(rounds):
        barrier = threading.Barrier(2)

        def ask(worker_id: str, barrier: threading.Barrier = barrier) -> Lease | None:
            barrier.wait()
            return _claim(database, worker_id)

        with ThreadPoolExecutor(2) as pool:
            [lease] = filter(None, pool.map(ask, ("one", "two")))
        assert sum(held(database).values()) <= DEVICE.training_bytes
        _release(database, lease)


def test_a_job_that_waits_says_for_what_once_and_starts_when_the_other_has_ended(jobs: Jobs) -> None:
    first, second = queue(jobs, 8.0, 3.2)
    lease = _claim(jobs.context.database, "other")
    assert lease.job_id == first
    for _ in range(3):
        assert claim(jobs.context) is None
    assert waits(jobs, second) == [
        "The job waits for 3.2 GB of memory on here cpu: of training's 10.0 GB, 2.0 GB are free, other jobs "
        "hold 8.0 GB, and serving can lend too little of its 5.0 GB"
    ]
    assert jobs.status(second) == "queued"
    _release(jobs.context.database, lease)
    assert jobs.claim().lease.job_id == second
    assert list(held(jobs.context.database)) == [second]


def test_a_job_that_fits_once_others_have_ended_is_not_overtaken(jobs: Jobs, context: WorkerContext) -> None:
    running, large, small = queue(jobs, 4.0, 9.0, 2.0)
    lease = _claim(context.database)
    assert lease.job_id == running
    assert _claim(context.database) is None
    _release(context.database, lease)
    assert _claim(context.database).job_id == large
    assert jobs.status(small) == "queued"


def test_a_job_that_needs_some_of_serving_s_part_is_overtaken(jobs: Jobs, context: WorkerContext) -> None:
    large, small = queue(jobs, 12.0, 2.0)
    assert _claim(context.database).job_id == small
    assert jobs.status(large) == "queued"


def test_a_job_whose_peak_is_rough_starts_alone_with_what_there_is(jobs: Jobs) -> None:
    [job_id] = queue(jobs, 12.0, least=9.0)
    assert jobs.claim()
    assert held(jobs.context.database) == {job_id: 10 * _GB}


def test_a_grant_without_a_renewal_lapses(jobs: Jobs, context: WorkerContext) -> None:
    first, second = queue(jobs, 8.0, 8.0)
    assert _claim(context.database, "dead", seconds=3).job_id == first
    assert _claim(context.database) is None
    wait_until(lambda: _claim(context.database), seconds=30, what="the bytes are free")
    assert jobs.status(second) == "running"
    context.watch = Watch(0)
    sweep(context)
    assert list(held(context.database)) == [second]


def test_a_renewed_lease_keeps_its_memory(jobs: Jobs, context: WorkerContext) -> None:
    queue(jobs, 8.0, 8.0)
    lease = _claim(context.database, seconds=0.001)
    with context.database.transaction() as session:
        leases.renew(session, lease, 30)
    assert _claim(context.database, "other") is None


def test_the_release_of_an_old_attempt_frees_nothing_of_a_new_one(jobs: Jobs, context: WorkerContext) -> None:
    [job_id] = queue(jobs, 4.0)
    old = _claim(context.database)
    assert old is not None
    with context.database.transaction() as session:
        leases.leave(session, old, leases.JobStatus.QUEUED, outcome="given_back")
    new = _claim(context.database)
    assert new.fencing_token == old.fencing_token + 1
    with context.database.transaction() as session:
        memory.release(session, job_id, old.fencing_token)
        memory.release(session, job_id, old.fencing_token)
    assert list(held(context.database)) == [job_id]


def test_a_job_that_no_device_can_ever_hold_fails_at_once_with_the_numbers(jobs: Jobs) -> None:
    [job_id] = queue(jobs, 20.0)
    assert train_next(jobs.context)
    error = jobs.error(job_id)
    assert error.code == "out_of_memory"
    assert "needs about 18.2 GB of memory, and here cpu has 15.0 GB" in error.message
    assert held(jobs.context.database) == {}


def test_a_job_that_is_too_large_here_is_left_to_a_larger_device(jobs: Jobs, context: WorkerContext) -> None:
    [job_id] = queue(jobs, 20.0)
    larger = Device("there", "cpu", 25 * _GB, 5 * _GB)
    # A worker there, which never had a job, says that it lives.
    sweep(replace(context, device=larger))
    assert _claim(context.database) is None
    assert _claim(context.database, "w", larger).job_id == job_id


def test_prepare_notes_what_a_job_needs(jobs: Jobs) -> None:
    row = jobs.row(jobs.prepared(training={}, hyperparameters={}))
    # A process with its libraries, and the tiny base; the least is with one row at a time.
    assert 500_000_000 < row.least_bytes < row.peak_bytes < 700_000_000
