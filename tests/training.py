"""What tests let a worker do."""

from functools import cache

import openai

from db.tables import Job
from luthier.core.settings import Settings
from tests.conftest import Api
from tests.rows import colour_rows, jsonl
from worker.app import sweep
from worker.context import WorkerContext, make_context
from worker.tasks.train import claim, train
from worker.training_process.fork_server import ForkServer


@cache
def fork_server() -> ForkServer:
    """Return what many tests' runs are forked from, so that each need not import torch and transformers."""
    return ForkServer(idle_seconds=3600)


def make_worker(settings: Settings, api: Api) -> WorkerContext:
    """Make a worker that is known to be alive; its notifications are noted beside the API's."""
    made = make_context(settings)
    made.notify = api.notified.append
    made.fork_server = fork_server()
    sweep(made)
    return made


def train_next(context: WorkerContext) -> bool:
    """Claim the oldest queued job and run it to an end; return whether there was one."""
    claimed = claim(context)
    if claimed is None:
        return False
    train(context, claimed)
    return True


def create_short_job(client: openai.OpenAI, *, n_epochs: int = 1, batch_size: int = 4) -> str:
    """Create a job of a few steps in fp32; return its id."""
    file = client.files.create(file=("rows.jsonl", jsonl(colour_rows())), purpose="fine-tune")
    return client.fine_tuning.jobs.create(
        model="tiny-llama",
        training_file=file.id,
        hyperparameters={"n_epochs": n_epochs, "batch_size": batch_size},
        extra_body={"training": {"precision": "float32"}},
    ).id


def job_row(context: WorkerContext, job_id: str) -> Job:
    with context.database.transaction() as session:
        return session.get_one(Job, job_id)
