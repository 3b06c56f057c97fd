"""A job on preferences over HTTP, from its files to a model, with the strict SDK."""

from typing import Any

import openai
import pytest
from openai.types.fine_tuning import FineTuningJob
from sqlalchemy import update

from db.tables import File
from tests.conftest import Api
from tests.rows import colour_rows, jsonl, preference_row
from worker.context import WorkerContext
from worker.processes import work


def preferences(num_rows: int) -> bytes:
    return jsonl(
        [preference_row(f"colour of {n}?", f"it is red {n}", f"no idea {n + 1}") for n in range(num_rows)]
    )


def _dpo(**hyperparameters: Any) -> Any:
    return {"type": "dpo", "dpo": {"hyperparameters": hyperparameters}}


def _beta_of(job: FineTuningJob) -> object:
    assert (job.method.type, job.method.supervised) == ("dpo", None)
    return job.method.dpo.hyperparameters.beta


def test_preferences_make_a_model_and_report_rewards(
    api: Api, client: openai.OpenAI, context: WorkerContext
) -> None:
    body: dict[str, Any] = {
        "model": "tiny-llama",
        "training_file": api.upload_file(preferences(16)),
        "method": _dpo(n_epochs=2, batch_size=4, beta="auto"),
    }
    extra = {"training": {"validation_split": 0.25, "precision": "float32", "learning_rate": 5e-3}}
    estimate: Any = client.post("/fine_tuning/jobs/estimate", body={**body, **extra}, cast_to=object)
    job = client.fine_tuning.jobs.create(**body, seed=1, extra_body=extra)
    assert _beta_of(job) == "auto"
    work(context)
    job = client.fine_tuning.jobs.retrieve(job.id)
    assert job.status == "succeeded", job.error
    assert _beta_of(job) == 0.1
    events = client.fine_tuning.jobs.list_events(job.id, limit=100).data
    steps = [event.data for event in events if event.type == "metrics"]
    assert len(steps) == 2 * 3
    assert all({"train_loss", "train_reward_accuracy", "train_reward_margin"} <= set(step) for step in steps)
    assert steps[0]["full_valid_reward_accuracy"] == 1.0
    reported = [
        event.message for event in events if event.message.startswith(("Base model", "Evaluation at"))
    ]
    # The newest first; at its start a model has gained nothing yet.
    assert all("reward accuracy=" in message and "reward margin=" in message for message in reported[:-1])
    assert len(reported) > 1
    assert "reward" not in reported[-1]
    table = client.files.content(job.result_files[0]).text.splitlines()
    assert table[0].endswith("full_valid_reward_accuracy,full_valid_reward_margin")
    assert len(table) == 1 + 6
    assert (estimate["rows"]["train"], estimate["rows"]["validation"]) == (12, 4)
    assert (estimate["steps"], estimate["beta"]) == (6, 0.1)
    # Which rows are held back is settled by prepare, so an estimate knows their share of all tokens.
    assert job.trained_tokens == pytest.approx(estimate["trained_tokens"], rel=0.02)
    report: Any = client.get(f"/fine_tuning/jobs/{job.id}/report", cast_to=object)
    assert report["run"]["num_trained_parameters"] == estimate["num_trained_parameters"]
    # Beside the weights, the names in their file's head and the configuration.
    assert 0 <= report["run"]["artifact_bytes"] - estimate["artifact_bytes"] < 10_000


def test_rows_of_the_other_kind_are_refused_with_the_field_and_what_to_do(
    api: Api, client: openai.OpenAI
) -> None:
    chats, pairs = api.upload_file(jsonl(colour_rows())), api.upload_file(preferences(12))
    rows = jsonl(colour_rows())
    in_parts = client.uploads.upload_file_chunked(
        file=rows, filename="a", bytes=len(rows), mime_type="text/jsonl", purpose="fine-tune"
    )
    dpo: dict[str, Any] = {"method": {"type": "dpo"}}
    cases = [
        ({"training_file": chats, **dpo}, "training_file", "learns from preferences"),
        ({"training_file": in_parts.file.id, **dpo}, "training_file", "learns from preferences"),
        ({"training_file": pairs, "validation_file": chats, **dpo}, "validation_file", '"supervised"'),
        ({"training_file": pairs}, "training_file", "belong to jobs of method dpo"),
        ({"training_file": chats, "validation_file": pairs}, "validation_file", 'method.type to "dpo"'),
    ]
    for body, param, expected in cases:
        with pytest.raises(openai.BadRequestError, match=expected) as refused:
            client.fine_tuning.jobs.create(model="tiny-llama", **body)
        assert refused.value.param == param


def test_in_files_without_a_recorded_format_prepare_finds_rows_of_the_other_kind(
    api: Api, client: openai.OpenAI, context: WorkerContext
) -> None:
    chats, pairs = api.upload_file(jsonl(colour_rows())), api.upload_file(preferences(12))
    with api.state.database.transaction() as session:
        session.execute(update(File).values(row_format=None))
    of_chats, of_pairs = api.create_job(chats, method={"type": "dpo"}), api.create_job(pairs)
    for job, expected in ((of_chats, "learns from preferences"), (of_pairs, "belong to jobs of method dpo")):
        work(context)
        failed = client.fine_tuning.jobs.retrieve(job["id"])
        assert failed.status == "failed"
        assert failed.error.code == "invalid_training_file"
        assert expected in failed.error.message


def test_a_beta_out_of_range_is_refused_by_name(api: Api) -> None:
    file_id = api.upload_file(preferences(12))
    for beta in (0, 2.5, "much"):
        body = {"model": "tiny-llama", "training_file": file_id, "method": _dpo(beta=beta)}
        refused = api.refused("POST", "/fine_tuning/jobs", body)
        assert (refused[0], refused[2]) == (400, "method.dpo.hyperparameters.beta")
