"""A job on preferences over HTTP, from its files to a model, with the strict SDK."""

import openai
import pytest

from tests.rows import colour_rows, jsonl, preference_row
from worker.app import work
from worker.context import WorkerContext


def upload(client: openai.OpenAI, content: bytes) -> str:
    return client.files.create(file=("rows.jsonl", content), purpose="fine-tune").id


def preferences(num_rows: int) -> bytes:
    return jsonl(
        [preference_row(f"colour of {n}?", f"it is red {n}", f"no idea {n + 1}") for n in range(num_rows)]
    )


def test_preferences_make_a_model_and_rewards_are_told(client: openai.OpenAI, context: WorkerContext) -> None:
    job = client.fine_tuning.jobs.create(
        model="tiny-llama",
        training_file=upload(client, preferences(16)),
        seed=1,
        method={
            "type": "dpo",
            "dpo": {"hyperparameters": {"n_epochs": 2, "batch_size": 4, "beta": "auto"}},
        },
        extra_body={"training": {"validation_split": 0.25, "precision": "float32", "learning_rate": 5e-3}},
    )
    assert job.method is not None
    assert job.method.dpo is not None
    assert job.method.dpo.hyperparameters is not None
    assert (job.method.type, job.method.dpo.hyperparameters.beta) == ("dpo", "auto")
    work(context, job.id)
    job = client.fine_tuning.jobs.retrieve(job.id)
    assert job.status == "succeeded", job.error
    assert job.method is not None
    assert job.method.dpo is not None
    assert job.method.dpo.hyperparameters is not None
    assert job.method.dpo.hyperparameters.beta == 0.1
    assert job.method.supervised is None
    events = client.fine_tuning.jobs.list_events(job.id, limit=100).data
    steps = [event.data for event in events if event.type == "metrics"]
    assert len(steps) == 2 * 3
    assert all({"train_loss", "train_reward_accuracy", "train_reward_margin"} <= set(step) for step in steps)
    assert steps[0]["full_valid_reward_accuracy"] == 1.0
    told = [event.message for event in events if event.message.startswith(("Base model", "Evaluation at"))]
    # The newest first; at its start a model has gained nothing yet.
    assert all("reward accuracy=" in message and "reward margin=" in message for message in told[:-1])
    assert len(told) > 1
    assert "reward" not in told[-1]
    table = client.files.content(job.result_files[0]).text.splitlines()
    assert table[0].endswith("full_valid_reward_accuracy,full_valid_reward_margin")
    assert len(table) == 1 + 6


def test_rows_of_the_other_kind_fail_the_job_with_the_reason(
    client: openai.OpenAI, context: WorkerContext
) -> None:
    chats = client.fine_tuning.jobs.create(
        model="tiny-llama", training_file=upload(client, jsonl(colour_rows())), method={"type": "dpo"}
    )
    pairs = client.fine_tuning.jobs.create(model="tiny-llama", training_file=upload(client, preferences(12)))
    for job, expected in ((chats, "learns from preferences"), (pairs, "belong to jobs of method dpo")):
        work(context, job.id)
        failed = client.fine_tuning.jobs.retrieve(job.id)
        assert failed.status == "failed"
        assert failed.error is not None
        assert failed.error.code == "invalid_training_file"
        assert expected in failed.error.message


@pytest.mark.parametrize("beta", [0, 2.5, "much"])
def test_a_beta_out_of_range_is_refused_by_name(client: openai.OpenAI, beta: object) -> None:
    file_id = upload(client, preferences(12))
    with pytest.raises(openai.BadRequestError) as refused:
        client.fine_tuning.jobs.create(
            model="tiny-llama",
            training_file=file_id,
            method={"type": "dpo", "dpo": {"hyperparameters": {"beta": beta}}},  # type: ignore[typeddict-item]
        )
    assert refused.value.param == "method.dpo.hyperparameters.beta"
