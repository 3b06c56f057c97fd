"""What a job may choose, its method and its result, with the real training process."""

import httpx2
import openai
import pytest

from luthier.client import LuthierClient
from luthier.methods import discover
from tests.conftest import Api
from tests.rows import colour_rows, jsonl
from worker.context import WorkerContext
from worker.processes import work


@pytest.fixture
def client(api: Api) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{api.base_url}/v1", api_key=api.key, max_retries=0)


def test_the_best_checkpoint_of_a_training_that_stopped_early_is_the_model(
    api: Api, client: openai.OpenAI, context: WorkerContext
) -> None:
    file = client.files.create(file=("rows.jsonl", jsonl(colour_rows(30))), purpose="fine-tune")
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
    job_id = client.fine_tuning.jobs.create(
        model="tiny-llama",
        training_file=file.id,
        seed=1,
        extra_body={"training": training, "hyperparameters": {"n_epochs": 30, "batch_size": 8}},
    ).id
    work(context)
    job = client.fine_tuning.jobs.retrieve(job_id)
    assert job.status == "succeeded", job.error
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
    model = httpx2.get(f"{api.base_url}/v1/models/{job.fine_tuned_model}", headers=api.headers).json()
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
    api: Api, client: openai.OpenAI, context: WorkerContext, method: str
) -> None:
    file = client.files.create(file=("rows.jsonl", jsonl(colour_rows(12))), purpose="fine-tune")
    job_id = client.fine_tuning.jobs.create(
        model="tiny-llama",
        training_file=file.id,
        seed=1,
        extra_body={"tuning": {"type": method}, "hyperparameters": {"n_epochs": 1, "batch_size": 4}},
    ).id
    work(context)
    job = client.fine_tuning.jobs.retrieve(job_id)
    assert job.status == "succeeded", job.error
    assert "auto" not in str(job.to_dict()["tuning"])
    url = f"{api.base_url}/v1/models/{job.fine_tuned_model}/files"
    files = {entry["name"]: entry["bytes"] for entry in httpx2.get(url, headers=api.headers).json()["data"]}
    with LuthierClient(f"{api.base_url}/v1", api.key) as ours:
        run = ours.get_report(job_id)["run"]
    assert run["method"] == method
    assert 0 < run["artifact_bytes"] < sum(files.values())
    assert 0 < run["num_trained_parameters"] <= run["num_base_parameters"]
