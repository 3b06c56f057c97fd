"""The main path of a program written for OpenAI, run by whichever `openai` its interpreter has.

Prints what it saw as one JSON object. Environment: OPENAI_BASE_URL, OPENAI_API_KEY, ROWS (a file).
"""

import json
import os
import time
from pathlib import Path

import openai


def main() -> None:
    """Upload, tune, look on, ask for the model, cancel another job, clean up."""
    client = openai.OpenAI()
    file = client.files.create(file=Path(os.environ["ROWS"]), purpose="fine-tune")
    client.files.wait_for_processing(file.id)
    job = client.fine_tuning.jobs.create(
        model="gpt-4o-mini-2024-07-18",
        training_file=file.id,
        suffix="mine",
        seed=1,
        hyperparameters={"n_epochs": 1, "batch_size": "auto"},
    )
    deadline = time.monotonic() + 120
    while job.status not in ("succeeded", "failed", "cancelled") and time.monotonic() < deadline:
        time.sleep(0.2)
        job = client.fine_tuning.jobs.retrieve(job.id)
    events = [event.message for event in client.fine_tuning.jobs.list_events(job.id, limit=2)]
    checkpoints = client.fine_tuning.jobs.checkpoints.list(job.id).data
    table = client.files.content(job.result_files[0]).text
    other = client.fine_tuning.jobs.create(model="tiny-llama", training_file=file.id)
    cancelled = client.fine_tuning.jobs.cancel(other.id)
    refused = ""
    try:
        client.fine_tuning.jobs.create(model="no-such-model", training_file=file.id)
    except openai.BadRequestError as error:
        refused = str(error.code)
    reported = {
        "version": openai.__version__,
        "status": job.status,
        "model": job.fine_tuned_model,
        "checkpoint": checkpoints[0].fine_tuned_model_checkpoint,
        "last_event": next(iter(events)),
        "num_steps": len(table.splitlines()) - 1,
        "is_listed": job.fine_tuned_model in [model.id for model in client.models.list()],
        "jobs": [one.id for one in client.fine_tuning.jobs.list(limit=1)],
        "made": [other.id, job.id],
        "cancelled": cancelled.status,
        "refused": refused,
        "deleted": [
            client.models.delete(str(job.fine_tuned_model)).deleted,
            client.files.delete(file.id).deleted,
        ],
    }
    print(json.dumps(reported))


main()
