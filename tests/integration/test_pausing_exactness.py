"""A job that was paused at some step and went on an hour later is, byte for byte, the job that never was."""

import random

import openai
import pytest
from sqlalchemy import DateTime, text

from db.tables import Job, Model, Table
from tests.conftest import Api
from tests.rows import colour_rows
from tests.training import Jobs, train_next
from worker.app import sweep
from worker.context import WorkerContext
from worker.maintenance import collect_garbage
from worker.processes import work

NUM_STEPS = 120


@pytest.fixture
def client(api: Api) -> openai.OpenAI:
    return api.client(is_strict=False)


# Random numbers in every step, and no save point but those of a pause.
JOB = {
    "rows": colour_rows(NUM_STEPS // 2),
    "training": {"precision": "float32", "save_every_steps": 10 * NUM_STEPS},
    "tuning": {"type": "lora", "dropout": 0.2},
    "hyperparameters": {"n_epochs": 2, "batch_size": 1},
}


def _let_an_hour_pass(context: WorkerContext) -> None:
    """Move every moment that the database knows an hour back: its clock is the only one that counts."""
    with context.database.transaction() as session:
        for table in Table.metadata.sorted_tables:
            moments = [column.name for column in table.columns if isinstance(column.type, DateTime)]
            if moments:
                moved = ", ".join(f"{name} = {name} - interval '1 hour'" for name in moments)
                session.execute(text(f"UPDATE {table.name} SET {moved}"))


def _pause_at(jobs: Jobs, job_id: str, step: int) -> None:
    run = jobs.start_training(job_id, until_step=step)
    assert jobs.pause(job_id) == "pausing"
    run.join(timeout=60)
    assert not run.is_alive(), "the job is pausing for ever"
    job = jobs.row(job_id)
    assert (job.status, job.lease_owner, job.lease_expires_at) == ("paused", None, None)
    assert step <= job.step < NUM_STEPS
    assert [point["step"] for point in job.save_points] == [job.step], "the last step is not kept"


@pytest.mark.parametrize("seed", [1, *(pytest.param(n, marks=pytest.mark.full) for n in range(2, 7))])
def test_a_job_paused_at_a_random_step_for_an_hour_gives_the_undisturbed_digest(
    seed: int, jobs: Jobs, context: WorkerContext
) -> None:
    undisturbed, disturbed = jobs.prepared(**JOB), jobs.prepared(**JOB)
    assert train_next(context)
    _pause_at(jobs, disturbed, random.Random(seed).randrange(1, NUM_STEPS // 4))

    with context.database.transaction() as session:
        assert session.query(Job).filter_by(lease_owner=context.worker_id).count() == 0
    _let_an_hour_pass(context)
    sweep(context)
    collect_garbage(context, grace_seconds=0)
    assert jobs.status(disturbed) == "paused"

    assert jobs.resume(disturbed) == "queued"
    work(context)
    for job_id in (undisturbed, disturbed):
        jobs.succeeded(job_id)
    with context.database.transaction() as session:
        digests = {model.artifact_digest for model in session.query(Model).filter_by(kind="tuned")}
    assert len(digests) == 1, "the pause has changed the model"
    assert jobs.outcomes(disturbed) == ["prepared", "paused", "succeeded"]
    # No step was lost and none was done twice.
    reported = [message for message in jobs.messages(disturbed) if message.startswith("Step ")]
    steps = [int(message[5:].partition("/")[0]) for message in reported]
    assert steps == list(range(1, NUM_STEPS + 1))
