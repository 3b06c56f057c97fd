"""Projects take turns: one with a long queue keeps no other waiting behind all of it."""

import openai
import pytest
from sqlalchemy import func, update

from db.tables import Job
from services.jobs import leases
from tests.conftest import Api
from tests.rows import colour_rows, jsonl
from worker.context import WorkerContext


def _create(client: openai.OpenAI, count: int) -> list[str]:
    file = client.files.create(file=("rows.jsonl", jsonl(colour_rows(12))), purpose="fine-tune")
    return [
        client.fine_tuning.jobs.create(model="tiny-llama", training_file=file.id, seed=1).id
        for _ in range(count)
    ]


@pytest.fixture
def violins(api: Api) -> openai.OpenAI:
    """A client of another project."""
    return api.client(api.make_key("violins")["key"])


def _train(context: WorkerContext) -> str:
    with context.database.transaction() as session:
        lease, job = leases.claim_for_training(session, "one", 8, 30)
        leases.leave(session, lease, leases.JobStatus.FAILED, outcome="failed")
        return job.id


def _prepare(context: WorkerContext) -> str:
    """Claim the next job whose files are to be checked and queue it; return its id."""
    with context.database.transaction() as session:
        [job_id] = leases.list_unchecked(session, context.worker_id, limit=1, can_run=context.can_run())
        lease = leases.claim_for_preparing(session, job_id, "one", 30)
        assert lease is not None
        leases.leave(session, lease, leases.JobStatus.QUEUED, outcome="prepared")
    return job_id


def _queue_all(context: WorkerContext) -> None:
    with context.database.transaction() as session:
        session.execute(
            update(Job).where(Job.status == "validating_files").values(status="queued", prepared_key="none")
        )


def test_the_other_projects_job_is_next_whatever_one_has_queued(
    violins: openai.OpenAI, client: openai.OpenAI, context: WorkerContext
) -> None:
    many = _create(client, 30)
    _queue_all(context)
    assert [_train(context) for _ in range(2)] == many[:2]
    [other] = _create(violins, 1)
    _queue_all(context)
    assert _train(context) == other
    assert [_train(context) for _ in range(2)] == many[2:4]


def test_two_long_queues_are_served_in_turn(
    violins: openai.OpenAI, client: openai.OpenAI, context: WorkerContext
) -> None:
    mine = _create(client, 6)
    others = _create(violins, 3)
    _queue_all(context)
    taken = [_train(context) for _ in range(6)]
    assert [job_id for job_id in taken if job_id in mine] == mine[:3]
    assert [job_id for job_id in taken if job_id in others] == others
    assert {frozenset(pair) for pair in zip(taken[::2], taken[1::2], strict=True)} == {
        frozenset(pair) for pair in zip(mine, others, strict=False)
    }


def test_a_project_with_a_running_job_goes_behind_one_without(
    violins: openai.OpenAI, client: openai.OpenAI, context: WorkerContext
) -> None:
    mine = _create(client, 3)
    [other] = _create(violins, 1)
    _queue_all(context)
    with context.database.transaction() as session:
        # The other project was served last, and has nothing at work.
        for expected in (mine[0], other):
            assert leases.claim_for_training(session, "two", 8, 30)[1].id == expected
        session.execute(
            update(Job)
            .where(Job.id == other)
            .values(status="queued", lease_owner=None, lease_expires_at=None)
        )
    assert _train(context) == other


def test_files_wait_for_their_check_in_turn(
    violins: openai.OpenAI, client: openai.OpenAI, context: WorkerContext
) -> None:
    many = _create(client, 5)
    assert _prepare(context) == many[0]
    [other] = _create(violins, 1)
    assert _prepare(context) == other
    assert [_prepare(context) for _ in range(2)] == many[1:3]


def test_a_resumed_queue_of_old_jobs_counts_its_newest_claim(
    violins: openai.OpenAI, client: openai.OpenAI, context: WorkerContext
) -> None:
    """Jobs that ran before and wait again may not pass for jobs that were never served."""
    mine = _create(client, 3)
    [other] = _create(violins, 1)
    with context.database.transaction() as session:
        session.execute(
            update(Job).where(Job.id.in_(mine)).values(started_at=func.now() - func.make_interval(0, 0, 1))
        )
    _queue_all(context)
    assert _train(context) == mine[0]
    assert _train(context) == other
