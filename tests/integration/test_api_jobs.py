"""The jobs resource over HTTP before any worker has touched a job."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from tests.conftest import Api
from tests.rows import colour_rows, jsonl

pytestmark = pytest.mark.shared_api
_WANDB = {"type": "wandb", "wandb": {"project": "p"}}


def _refused(
    api: Api, file_id: str, change: dict[str, Any], path: str = ""
) -> tuple[int, str, str | None, str]:
    body = {"model": "tiny-llama", "training_file": file_id} | change
    return api.refused("POST", f"/fine_tuning/jobs{path}", body)


def test_a_created_job_has_openais_shape_and_notifies_once(
    api: Api, client: openai.OpenAI, file_id: str
) -> None:
    job = client.fine_tuning.jobs.create(
        model="gpt-4o-mini-2024-07-18", training_file=file_id, suffix="mine", metadata={"team": "a"}, seed=7
    )
    assert (job.status, job.model, job.seed) == ("validating_files", "tiny-llama", 7)
    assert (job.fine_tuned_model, job.error, job.result_files) == (None, None, [])
    assert job.hyperparameters.n_epochs == "auto"
    assert job.method.type == "supervised"
    assert api.notified == [job.id]
    assert client.fine_tuning.jobs.retrieve(job.id) == job
    messages = [event.message for event in client.fine_tuning.jobs.list_events(job.id)]
    assert messages == [f"Validating training file: {file_id}", f"Created fine-tuning job: {job.id}"]
    assert client.fine_tuning.jobs.checkpoints.list(job.id).data == []


def test_a_cancelled_job_ends_and_frees_its_file(client: openai.OpenAI, file_id: str) -> None:
    job = client.fine_tuning.jobs.create(model="tiny-llama", training_file=file_id)
    with pytest.raises(openai.BadRequestError) as in_use:
        client.files.delete(file_id)
    assert in_use.value.code == "file_in_use"
    cancelled = client.fine_tuning.jobs.cancel(job.id)
    assert cancelled.status == "cancelled"
    assert cancelled.finished_at is not None
    with pytest.raises(openai.BadRequestError) as ended:
        client.fine_tuning.jobs.cancel(job.id)
    assert "cancelled" in str(ended.value)
    assert client.files.delete(file_id).deleted


@pytest.mark.parametrize("name", ["tuning", "training", "method"])
def test_what_is_no_object_is_reported_in_the_words_of_json(api: Api, file_id: str, name: str) -> None:
    _, code, param, message = _refused(api, file_id, {name: "lora"})
    assert (code, param) == ("invalid_type", name)
    assert message.endswith("Send a JSON object.")


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"model": None}, "model", "invalid_type"),
        ({"model": "nope"}, "model", "model_not_available"),
        ({"training_file": "file-nope"}, "training_file", "invalid_value"),
        ({"validation_file": "file-nope"}, "validation_file", "invalid_value"),
        ({"learning_rate": 1}, "learning_rate", "unknown_parameter"),
        ({"body": 1}, "body", "unknown_parameter"),
        ({"trainingtype": 1}, "trainingtype", "unknown_parameter"),
        ({"method": {"type": "supervised", "sft": {}}}, "method.sft", "unknown_parameter"),
        ({"hyperparameters": {"epochs": 3}}, "hyperparameters.epochs", "unknown_parameter"),
        ({"training": {"epochs": 3}}, "training.epochs", "unknown_parameter"),
        ({"suffix": "a" * 65}, "suffix", "invalid_value"),
        ({"suffix": "a:b"}, "suffix", "invalid_value"),
        ({"suffix": "a\r\nb"}, "suffix", "invalid_value"),
        ({"seed": -1}, "seed", "invalid_value"),
        ({"seed": 2**31}, "seed", "invalid_value"),
        ({"metadata": {"k": 1}}, "metadata.k", "invalid_type"),
        ({"metadata": {"k" * 65: "v"}}, "metadata", "invalid_value"),
        ({"metadata": {"k": "v" * 513}}, "metadata", "invalid_value"),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata", "invalid_value"),
        ({"metadata": ["k"]}, "metadata", "invalid_type"),
        ({"metadata": "k"}, "metadata", "invalid_type"),
        *(
            ({"hyperparameters": {name: value}}, f"hyperparameters.{name}", "invalid_value")
            for name, value in (
                ("n_epochs", 0),
                ("n_epochs", 51),
                ("batch_size", 257),
                ("learning_rate_multiplier", 0),
            )
        ),
        ({"method": {"type": "reinforcement"}}, "method.type", "unsupported_value"),
        ({"integrations": [{"type": "wandb"}]}, "integrations.0.wandb", "missing_required_parameter"),
        ({"integrations": [_WANDB]}, "integrations.0.type", "unsupported_value"),
        ({"integrations": [{"type": "comet"}]}, "integrations.0.type", "invalid_value"),
        ({"integrations": [{"type": "wandb"}] * 6}, "integrations", "invalid_value"),
        ({"tuning": {"type": "lora", "rank": 0}}, "tuning.rank", "invalid_value"),
        ({"tuning": {"type": "lora", "rnak": 8}}, "tuning.rnak", "unknown_parameter"),
        ({"tuning": {"type": "sorcery"}}, "tuning.type", None),
        ({"training": {"max_length": 3}}, "training.max_length", "invalid_value"),
        ({"training": {"patients": 3}}, "training.patients", "unknown_parameter"),
        ({"training": {"patience": 3}}, "training.patience", "invalid_value"),
        ({"training": {"keep_best": True}}, "training.keep_best", "invalid_value"),
        ({"training": {"sample_prompts": ["a", ""]}}, "training.sample_prompts.1", "invalid_value"),
        ({"tuning": {"target_modules": ["q_proj", 3]}}, "tuning.target_modules.1", "invalid_type"),
        ({"tuning": {"quantization": "nf4"}}, "tuning.quantization", "unsupported_value"),
    ],
)
def test_a_bad_create_names_its_field_and_makes_no_job_and_no_estimate(
    api: Api, client: openai.OpenAI, file_id: str, change: dict[str, Any], param: str, code: str | None
) -> None:
    before = client.fine_tuning.jobs.list(limit=1).data
    refused = _refused(api, file_id, change)
    assert (refused[0], refused[2]) == (400, param), refused
    assert code in (None, refused[1]), refused
    assert client.fine_tuning.jobs.list(limit=1).data == before
    assert api.notified == []
    assert _refused(api, file_id, change, "/estimate") == refused


@pytest.mark.parametrize(
    ("change", "meant"),
    [
        ({"hyperparameters": {"n_epoch": 1}}, "hyperparameters.n_epochs"),
        ({"trainingfile": "f"}, "training_file"),
        ({"validation_split": 0.1}, "training.validation_split"),
        (
            {"method": {"type": "dpo", "dpo": {"hyperparameters": {"betta": 1}}}},
            "method.dpo.hyperparameters.beta",
        ),
    ],
)
def test_an_unknown_field_is_reported_with_the_one_that_was_meant(
    api: Api, file_id: str, change: dict[str, Any], meant: str
) -> None:
    message = _refused(api, file_id, change)[3]
    assert message.endswith(f"Did you mean '{meant}'?"), message


@pytest.mark.parametrize("name", ["zzz", "n_epochs" * 25_000])
def test_an_unknown_field_like_none_is_to_be_left_out(api: Api, file_id: str, name: str) -> None:
    assert _refused(api, file_id, {name: 1})[3].endswith("Leave it out.")


def test_nine_rows_are_too_few(api: Api) -> None:
    _, code, param, message = _refused(api, api.upload_file(jsonl(colour_rows(9))), {})
    assert (code, param) == ("invalid_n_examples", "training_file")
    assert "9 rows" in message


def test_nulls_mean_unset_and_unused_method_members_are_ignored(api: Api, file_id: str) -> None:
    body: dict[str, Any] = {
        **dict.fromkeys(("validation_file", "suffix", "seed", "metadata", "integrations", "tuning")),
        "method": {
            "type": "supervised",
            "supervised": {"hyperparameters": {"n_epochs": 2}},
            "dpo": {"hyperparameters": {"beta": "auto"}},
            "reinforcement": {"grader": {}},
        },
        "hyperparameters": {"batch_size": 4},
    }
    job = api.create_job(file_id, **body)
    assert job["hyperparameters"] == {"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": "auto"}
    assert job["method"]["supervised"]["hyperparameters"] == job["hyperparameters"]
    assert isinstance(job["seed"], int)


def test_reinforcement_and_its_graders_are_refused_in_clear_words(api: Api, file_id: str) -> None:
    _, code, param, message = _refused(api, file_id, {"method": {"type": "reinforcement"}})
    assert (code, param) == ("unsupported_value", "method.type")
    assert "reinforcement" in message
    assert "supervised" in message
    for grader in ("run", "validate"):
        refused = api.refused("POST", f"/fine_tuning/alpha/graders/{grader}", {"grader": {}})
        assert refused[:2] == (404, "unknown_url")


def test_an_idempotency_key_makes_one_job_however_often_it_is_sent(api: Api, file_id: str) -> None:
    once = {"headers": {"Idempotency-Key": "one"}}
    body = {"model": "tiny-llama", "training_file": file_id}
    with ThreadPoolExecutor(12) as pool:
        made = [*pool.map(lambda _: api.ok("POST", "/fine_tuning/jobs", body, **once)["id"], range(12))]
    assert len(set(made)) == 1


def test_a_refused_method_is_answered_with_those_there_are(api: Api) -> None:
    for method, path, allowed in (
        ("PUT", "/files", "GET, POST"),
        ("POST", "/files/file-1", "DELETE, GET"),
        ("GET", "/fine_tuning/jobs/ftjob-1/cancel", "POST"),
        ("GET", "/chat/completions", "POST"),
    ):
        answer = api.ask(method, path)
        assert answer.status_code == 405, answer.text
        assert answer.headers["allow"] == allowed


def test_an_unknown_model_is_never_answered_by_the_base(api: Api, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(
            model="ft:tiny-llama:personal::abcdefgh", messages=[{"role": "user", "content": "hi"}]
        )
    assert caught.value.code == "model_not_found"
    assert api.backend.asked == []


def test_chat_resolves_a_mapped_name_to_its_base(api: Api, client: openai.OpenAI) -> None:
    api.ok("POST", "/chat/completions", {"model": "gpt-4o-mini-2024-07-18", "messages": []})
    _, _, target = api.backend.asked[0]
    assert (target.base_id, target.model, target.digest) == ("tiny-llama", "gpt-4o-mini-2024-07-18", None)
    names = {model.id for model in client.models.list()}
    assert names == {"tiny-llama", "gpt-4o-mini-2024-07-18"}
    with pytest.raises(openai.PermissionDeniedError):
        client.models.delete("tiny-llama")
