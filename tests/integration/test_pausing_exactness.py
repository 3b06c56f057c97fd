"""A job that was paused at some step and went on an hour later is, byte for byte, the job that never was."""

import random
import threading

import openai
import pytest
from sqlalchemy import DateTime, text

from db.tables import Attempt, Model, Table
from services.jobs import leases
from tests.conftest import Api, wait_until
from tests.rows import colour_rows, jsonl
from tests.training import job_row, train_next
from worker.app import sweep
from worker.context import WorkerContext
from worker.maintenance import collect_garbage
from worker.processes import work
from worker.tasks.prepare import prepare

NUM_STEPS = 120


@pytest.fixture
def client(api: Api) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{api.base_url}/v1", api_key=api.key, max_retries=0)


def _create(client: openai.OpenAI, context: WorkerContext) -> str:
    file = client.files.create(file=("rows.jsonl", jsonl(colour_rows(NUM_STEPS // 2))), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model="tiny-llama",
        training_file=file.id,
        seed=1,
        # Random numbers in every step, and no save point but those of a pause.
        extra_body={
            "training": {"precision": "float32", "save_every_steps": 10 * NUM_STEPS},
            "tuning": {"type": "lora", "dropout": 0.2},
            "hyperparameters": {"n_epochs": 2, "batch_size": 1},
        },
    )
    prepare(context, job.id)
    return job.id


def _let_an_hour_pass(context: WorkerContext) -> None:
    """Move every moment that the database knows an hour back: its clock is the only one that counts."""
    with context.database.transaction() as session:
        for table in Table.metadata.sorted_tables:
            moments = [column.name for column in table.columns if isinstance(column.type, DateTime)]
            if moments:
                moved = ", ".join(f"{name} = {name} - interval '1 hour'" for name in moments)
                session.execute(text(f"UPDATE {table.name} SET {moved}"))


def _pause_at(client: openai.OpenAI, context: WorkerContext, job_id: str, step: int) -> None:
    run = threading.Thread(target=train_next, args=(context,))
    run.start()
    wait_until(lambda: job_row(context, job_id).step >= step, what=f"step {step}")
    assert client.fine_tuning.jobs.pause(job_id).status == "pausing"
    run.join(timeout=60)
    assert not run.is_alive(), "the job is pausing for ever"
    job = job_row(context, job_id)
    assert (job.status, job.lease_owner, job.lease_expires_at) == ("paused", None, None)
    assert step <= job.step < NUM_STEPS
    assert [point["step"] for point in job.save_points] == [job.step], "the last step is not kept"


@pytest.mark.parametrize("seed", [1, *(pytest.param(n, marks=pytest.mark.full) for n in range(2, 7))])
def test_a_job_paused_at_a_random_step_for_an_hour_gives_the_undisturbed_digest(
    seed: int, client: openai.OpenAI, context: WorkerContext
) -> None:
    undisturbed, disturbed = _create(client, context), _create(client, context)
    assert train_next(context)
    _pause_at(client, context, disturbed, random.Random(seed).randrange(1, NUM_STEPS // 4))

    with context.database.transaction() as session:
        assert not leases.is_at_work(session, context.worker_id)
    _let_an_hour_pass(context)
    sweep(context)
    collect_garbage(context, grace_seconds=0)
    assert client.fine_tuning.jobs.retrieve(disturbed).status == "paused"

    assert client.fine_tuning.jobs.resume(disturbed).status == "queued"
    work(context)
    for job_id in (undisturbed, disturbed):
        job = client.fine_tuning.jobs.retrieve(job_id)
        assert job.status == "succeeded", job.error
    with context.database.transaction() as session:
        digests = {model.artifact_digest for model in session.query(Model).filter_by(kind="tuned")}
        outcomes = [
            a.outcome for a in session.query(Attempt).filter_by(job_id=disturbed).order_by("lease_epoch")
        ]
    assert len(digests) == 1, "the pause has changed the model"
    assert outcomes == ["prepared", "paused", "succeeded"]
    # No step was lost and none was done twice.
    reported = [event.message for event in client.fine_tuning.jobs.list_events(disturbed, limit=1000)][::-1]
    steps = [int(message[5:].partition("/")[0]) for message in reported if message.startswith("Step ")]
    assert steps == list(range(1, NUM_STEPS + 1))
