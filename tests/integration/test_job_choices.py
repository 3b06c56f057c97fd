"""What a job may choose, its method and its result, with the real training process."""

import openai
import pytest

from luthier.client import LuthierClient
from luthier.methods import discover
from tests.conftest import Api
from tests.rows import colour_rows
from tests.training import Jobs
from worker.context import WorkerContext
from worker.processes import work


def test_the_best_checkpoint_of_a_training_that_stopped_early_is_the_model(
    api: Api, jobs: Jobs, client: openai.OpenAI, context: WorkerContext
) -> None:
    training = {
        "precision": "float32",
        "validation_split": 0.2,
        # High enough that the loss turns around within a few epochs.
        "learning_rate": 0.1,
        "warmup_ratio": 0.0,
        "patience": 2,
        "keep_best": True,
        "sample_prompts": ["what is the colour of number 3?"],
    }
    hyperparameters = {"n_epochs": 30, "batch_size": 8}
    job_id = jobs.create(rows=colour_rows(30), training=training, hyperparameters=hyperparameters)
    work(context)
    job = jobs.succeeded(job_id)
    with LuthierClient(f"{api.base_url}/v1", api.key) as ours:
        run = ours.get_report(job_id)["run"]

    scored = [evaluation for evaluation in run["evaluations"] if evaluation["step"] > 0]
    best = min(scored, key=lambda evaluation: evaluation["valid_loss"])
    assert run["steps_done"] < run["steps_planned"]
    assert "validation loss" in run["stopped_early"]
    assert run["result_step"] == best["step"] == scored[-3]["step"]
    assert run["seconds"]["tokenize"] > 0

    checkpoints = client.fine_tuning.jobs.checkpoints.list(job_id).data
    names = {entry.step_number: entry.fine_tuned_model_checkpoint for entry in checkpoints}
    assert names[best["step"]] == job.fine_tuned_model
    assert len(checkpoints) == 3
    model = api.ok("GET", f"/models/{job.fine_tuned_model}")
    assert model["digest"] == run["artifact_digest"]

    answers = [evaluation["answers"][0]["answer"] for evaluation in run["evaluations"]]
    events = client.fine_tuning.jobs.list_events(job_id, limit=100)
    reported = " ".join(event.to_json() for event in events)
    assert not [answer for answer in answers if len(answer) > 3 and answer in reported]
    assert run["stopped_early"] in reported
    [result_file] = job.result_files
    content = client.files.content(result_file).read().decode()
    assert content.count("\n") == 1 + run["steps_done"]


@pytest.mark.parametrize("method", discover())
def test_a_job_by_every_method_becomes_a_model_whose_report_names_its_size(
    api: Api, jobs: Jobs, context: WorkerContext, method: str
) -> None:
    job_id = jobs.create(tuning={"type": method}, training={})
    work(context)
    job = jobs.succeeded(job_id)
    assert "auto" not in str(job.to_dict()["tuning"])
    files = api.ok("GET", f"/models/{job.fine_tuned_model}/files")["data"]
    run = jobs.report(job_id)["run"]
    assert run["method"] == method
    assert 0 < run["artifact_bytes"] < sum(entry["bytes"] for entry in files)
    assert 0 < run["num_trained_parameters"] <= run["num_base_parameters"]
