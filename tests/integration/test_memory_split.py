"""Memory of training, with real PostgreSQL: what a job is given of a device, and what waiting jobs say."""

import threading
from dataclasses import replace

import openai
import pytest
from sqlalchemy import delete, select, update

from db.session import Database
from db.tables import Job, MemoryGrant, Worker
from luthier.core.devices import Device
from services.capacity import memory
from services.jobs import leases
from services.jobs.leases import Lease
from tests.conftest import Api, wait_until
from tests.rows import colour_rows, jsonl
from tests.training import train_next
from worker.app import sweep
from worker.context import Watch, WorkerContext
from worker.tasks.prepare import prepare
from worker.tasks.train import claim

_GB = 1_000_000_000
DEVICE = Device("here", "cpu", training_bytes=10 * _GB, serving_bytes=5 * _GB)


@pytest.fixture
def context(context: WorkerContext) -> WorkerContext:
    with context.database.transaction() as session:
        # This machine's own device, from the worker's first sweep.
        session.execute(delete(Worker))
    return replace(context, device=DEVICE)


def queue(
    client: openai.OpenAI, context: WorkerContext, *sizes: float, least: float | None = None
) -> list[str]:
    """Prepare jobs that need a number of GB, a margin included."""
    file = client.files.create(file=("rows.jsonl", jsonl(colour_rows(12))), purpose="fine-tune")
    made = []
    for size in sizes:
        job = client.fine_tuning.jobs.create(model="tiny-llama", training_file=file.id, seed=1)
        prepare(context, job.id)
        made.append(job.id)
        peak = round(size * _GB / memory.MARGIN) + 1
        needs = {"peak_bytes": peak, "least_bytes": peak if least is None else round(least * _GB)}
        with context.database.transaction() as session:
            session.execute(update(Job).where(Job.id == job.id).values(**needs))
    return made


def _claim(database: Database, worker_id: str, device: Device = DEVICE) -> Lease | None:
    with database.transaction() as session:
        taken = leases.claim_for_training(session, worker_id, 8, 30, device=device)
        return None if taken is None else taken[0]


def _release(database: Database, lease: Lease) -> None:
    with database.transaction() as session:
        leases.leave(session, lease, leases.JobStatus.FAILED, outcome="failed")
        memory.release(session, lease.job_id, lease.fencing_token)


def held(database: Database) -> dict[str, int]:
    """Return what jobs hold of training's part."""
    with database.transaction() as session:
        return {row.job_id: row.num_bytes for row in session.scalars(select(MemoryGrant))}


def waits(client: openai.OpenAI, job_id: str) -> list[str]:
    """Return what a job's events say that it waits for."""
    messages = [event.message for event in client.fine_tuning.jobs.list_events(job_id, limit=100)]
    return [message for message in messages if message.startswith("The job waits for")]


def test_of_two_that_ask_at_once_for_the_last_bytes_one_gets_them(
    client: openai.OpenAI, context: WorkerContext
) -> None:
    database, rounds = context.database, 4
    queue(client, context, *[6.0] * (rounds + 1))
    for _ in range(rounds):
        barrier = threading.Barrier(2)
        found: list[Lease] = []

        def ask(worker_id: str, barrier: threading.Barrier = barrier, found: list[Lease] = found) -> None:
            barrier.wait()
            lease = _claim(database, worker_id)
            if lease is not None:
                found.append(lease)

        threads = [threading.Thread(target=ask, args=(name,)) for name in ("one", "two")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        [lease] = found
        assert sum(held(database).values()) <= DEVICE.training_bytes
        _release(database, lease)


def test_a_job_that_waits_says_for_what_once_and_starts_when_the_other_has_ended(
    client: openai.OpenAI, context: WorkerContext
) -> None:
    first, second = queue(client, context, 8.0, 3.2)
    lease = _claim(context.database, "other")
    assert lease is not None
    assert lease.job_id == first
    for _ in range(3):
        assert claim(context) is None
    assert waits(client, second) == [
        "The job waits for 3.2 GB of memory on here cpu: of training's 10.0 GB, 2.0 GB are free, other jobs "
        "hold 8.0 GB, and serving can lend too little of its 5.0 GB"
    ]
    assert client.fine_tuning.jobs.retrieve(second).status == "queued"
    _release(context.database, lease)
    claimed = claim(context)
    assert claimed is not None
    assert claimed.lease.job_id == second
    assert list(held(context.database)) == [second]


def test_a_job_that_fits_once_others_have_ended_is_not_overtaken(
    client: openai.OpenAI, context: WorkerContext
) -> None:
    running, large, small = queue(client, context, 4.0, 9.0, 2.0)
    lease = _claim(context.database, "w")
    assert lease is not None
    assert lease.job_id == running
    assert _claim(context.database, "w") is None
    _release(context.database, lease)
    lease = _claim(context.database, "w")
    assert lease is not None
    assert lease.job_id == large
    assert client.fine_tuning.jobs.retrieve(small).status == "queued"


def test_a_job_that_needs_some_of_serving_s_part_is_overtaken(
    client: openai.OpenAI, context: WorkerContext
) -> None:
    large, small = queue(client, context, 12.0, 2.0)
    lease = _claim(context.database, "w")
    assert lease is not None
    assert lease.job_id == small
    assert client.fine_tuning.jobs.retrieve(large).status == "queued"


def test_a_job_whose_peak_is_rough_starts_alone_with_what_there_is(
    client: openai.OpenAI, context: WorkerContext
) -> None:
    [job_id] = queue(client, context, 12.0, least=9.0)
    claimed = claim(context)
    assert claimed is not None
    assert held(context.database) == {job_id: 10 * _GB}


def test_a_grant_without_a_renewal_lapses(client: openai.OpenAI, context: WorkerContext) -> None:
    first, second = queue(client, context, 8.0, 8.0)
    with context.database.transaction() as session:
        taken = leases.claim_for_training(session, "dead", 1, 3, device=DEVICE)
        assert taken is not None
        assert taken[0].job_id == first
    assert _claim(context.database, "w") is None
    leases_of: list[Lease] = []

    def is_claimed() -> bool:
        lease = _claim(context.database, "w")
        leases_of.extend([] if lease is None else [lease])
        return lease is not None

    wait_until(is_claimed, seconds=30, what="the bytes are free")
    assert leases_of[0].job_id == second
    context.watch = Watch(0)
    sweep(context)
    assert list(held(context.database)) == [second]


def test_a_renewed_lease_keeps_its_memory(client: openai.OpenAI, context: WorkerContext) -> None:
    queue(client, context, 8.0, 8.0)
    with context.database.transaction() as session:
        taken = leases.claim_for_training(session, "w", 1, 0.001, device=DEVICE)
        assert taken is not None
    with context.database.transaction() as session:
        leases.renew(session, taken[0], 30)
    assert _claim(context.database, "other") is None


def test_the_release_of_an_old_attempt_frees_nothing_of_a_new_one(
    client: openai.OpenAI, context: WorkerContext
) -> None:
    [job_id] = queue(client, context, 4.0)
    old = _claim(context.database, "w")
    assert old is not None
    with context.database.transaction() as session:
        leases.leave(session, old, leases.JobStatus.QUEUED, outcome="given_back")
    new = _claim(context.database, "w")
    assert new is not None
    assert new.fencing_token == old.fencing_token + 1
    with context.database.transaction() as session:
        memory.release(session, job_id, old.fencing_token)
        memory.release(session, job_id, old.fencing_token)
    assert list(held(context.database)) == [job_id]


def test_a_job_that_no_device_can_ever_hold_fails_at_once_with_the_numbers(
    client: openai.OpenAI, context: WorkerContext
) -> None:
    [job_id] = queue(client, context, 20.0)
    assert train_next(context)
    job = client.fine_tuning.jobs.retrieve(job_id)
    assert job.status == "failed"
    assert job.error is not None
    assert job.error.code == "out_of_memory"
    assert "needs about 18.2 GB of memory, and here cpu has 15.0 GB" in job.error.message
    assert held(context.database) == {}


def test_a_job_that_is_too_large_here_is_left_to_a_larger_device(
    client: openai.OpenAI, context: WorkerContext
) -> None:
    [job_id] = queue(client, context, 20.0)
    larger = Device("there", "cpu", 25 * _GB, 5 * _GB)
    # A worker there, which never had a job, says that it lives.
    sweep(replace(context, device=larger))
    assert _claim(context.database, "w") is None
    lease = _claim(context.database, "w", larger)
    assert lease is not None
    assert lease.job_id == job_id


def test_prepare_notes_what_a_job_needs(api: Api, client: openai.OpenAI, context: WorkerContext) -> None:
    file = client.files.create(file=("rows.jsonl", jsonl(colour_rows(12))), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(model="tiny-llama", training_file=file.id, seed=1)
    prepare(context, job.id)
    with api.state.database.transaction() as session:
        row = session.get_one(Job, job.id)
        assert row.peak_bytes is not None
        assert row.least_bytes is not None
        # A process with its libraries, and the tiny base; the least is with one row at a time.
        assert 500_000_000 < row.least_bytes < row.peak_bytes < 700_000_000
