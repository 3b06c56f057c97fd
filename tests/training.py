"""What tests let a worker do."""

import threading
from functools import cache
from typing import Any

import openai
from openai.types.fine_tuning import FineTuningJob

from db.tables import Attempt, Job
from luthier.core.settings import Settings
from tests.conftest import Api, wait_until
from tests.rows import colour_rows, jsonl
from worker.app import sweep
from worker.context import WorkerContext, make_context
from worker.tasks.prepare import prepare
from worker.tasks.train import Claimed, claim, train
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


class Jobs:
    """Jobs as the client that creates them and the worker that runs them see them."""

    def __init__(self, client: openai.OpenAI, context: WorkerContext) -> None:
        self.client, self.context = client, context

    def upload(self, rows: list[dict[str, Any]] | None = None) -> str:
        content = jsonl(colour_rows() if rows is None else rows)
        return self.client.files.create(file=("rows.jsonl", content), purpose="fine-tune").id

    def create(
        self,
        model: str = "tiny-llama",
        *,
        rows: list[dict[str, Any]] | None = None,
        file_id: str | None = None,
        **body: Any,
    ) -> str:
        """Create a job of a few steps in fp32, unless the body says otherwise."""
        training_file = file_id or self.upload(rows)
        extra = {"training": {"precision": "float32"}, "hyperparameters": {"n_epochs": 1, "batch_size": 4}}
        return self.client.fine_tuning.jobs.create(
            model=model, training_file=training_file, seed=1, extra_body=extra | body
        ).id

    def prepared(self, **options: Any) -> str:
        """Create a job and prepare it."""
        job_id = self.create(**options)
        prepare(self.context, job_id)
        return job_id

    def get(self, job_id: str) -> FineTuningJob:
        return self.client.fine_tuning.jobs.retrieve(job_id)

    def status(self, job_id: str) -> str:
        return self.get(job_id).status

    def error(self, job_id: str) -> Any:
        """Return the error of a job, which must have failed."""
        job = self.get(job_id)
        assert job.status == "failed", job.status
        return job.error

    def succeeded(self, job_id: str) -> FineTuningJob:
        """Return a job, which must have succeeded."""
        job = self.get(job_id)
        assert job.status == "succeeded", job.error
        return job

    def pause(self, job_id: str) -> str:
        return self.client.fine_tuning.jobs.pause(job_id).status

    def resume(self, job_id: str) -> str:
        return self.client.fine_tuning.jobs.resume(job_id).status

    def cancel(self, job_id: str) -> str:
        return self.client.fine_tuning.jobs.cancel(job_id).status

    def messages(self, job_id: str) -> list[str]:
        """Return the messages of its events, the oldest first."""
        listed = self.client.fine_tuning.jobs.list_events(job_id, limit=1000)
        return [event.message for event in listed][::-1]

    def report(self, job_id: str) -> dict[str, Any]:
        return self.client.get(f"/fine_tuning/jobs/{job_id}/report", cast_to=dict[str, Any])

    def checkpoints(self, job_id: str) -> dict[int, str]:
        """Return the names of its checkpoints by their steps, the newest first."""
        listed = self.client.fine_tuning.jobs.checkpoints.list(job_id)
        return {one.step_number: one.fine_tuned_model_checkpoint for one in listed}

    def row(self, job_id: str) -> Job:
        return job_row(self.context, job_id)

    def change(self, job_id: str, **values: Any) -> None:
        """Set columns of its row."""
        with self.context.database.transaction() as session:
            job = session.get_one(Job, job_id)
            for name, value in values.items():
                setattr(job, name, value)

    def end_pause(self, job_id: str) -> None:
        """Let the time come at which a job that was put off is tried again."""
        self.change(job_id, not_before=None)

    def outcomes(self, job_id: str) -> list[str | None]:
        with self.context.database.transaction() as session:
            rows = session.query(Attempt).filter_by(job_id=job_id).order_by(Attempt.lease_epoch)
            return [row.outcome for row in rows]

    def claim(self) -> Claimed:
        """Claim the oldest queued job, which there must be."""
        claimed = claim(self.context)
        assert claimed is not None, "no job to claim"
        return claimed

    def start_training(self, job_id: str, *, until_step: int) -> threading.Thread:
        """Train the oldest queued job in a thread, and wait until a job has done a step."""
        thread = threading.Thread(target=train_next, args=(self.context,))
        thread.start()
        wait_until(lambda: self.row(job_id).step >= until_step, what=f"step {until_step}")
        return thread
