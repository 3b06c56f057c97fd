"""The jobs resource over HTTP before any worker has touched a job."""

import asyncio
import threading
from collections.abc import AsyncGenerator
from typing import Any

import httpx2
import openai
import pytest

from luthier.core.errors import UnavailableError
from luthier.serving.base import Reply
from tests.conftest import Api
from tests.rows import colour_rows, jsonl


@pytest.fixture
def file_id(client: openai.OpenAI) -> str:
    return client.files.create(file=("rows.jsonl", jsonl(colour_rows())), purpose="fine-tune").id


def _post(api: Api, body: dict[str, Any], **headers: str) -> httpx2.Response:
    return httpx2.post(f"{api.base_url}/v1/fine_tuning/jobs", headers=api.headers | headers, json=body)


def test_a_created_job_has_openais_shape_and_notifies_once(
    api: Api, client: openai.OpenAI, file_id: str
) -> None:
    job = client.fine_tuning.jobs.create(
        model="gpt-4o-mini-2024-07-18", training_file=file_id, suffix="mine", metadata={"team": "a"}, seed=7
    )
    assert (job.status, job.model, job.seed) == ("validating_files", "tiny-llama", 7)
    assert (job.fine_tuned_model, job.error, job.result_files) == (None, None, [])
    assert job.hyperparameters.n_epochs == "auto"
    assert job.method is not None
    assert job.method.type == "supervised"
    assert api.notified == [job.id]
    assert client.fine_tuning.jobs.retrieve(job.id) == job
    messages = [event.message for event in client.fine_tuning.jobs.list_events(job.id)]
    assert messages == [f"Validating training file: {file_id}", f"Created fine-tuning job: {job.id}"]
    assert client.fine_tuning.jobs.checkpoints.list(job.id).data == []


def test_jobs_are_listed_newest_first_and_filtered_by_metadata(client: openai.OpenAI, file_id: str) -> None:
    made = [
        client.fine_tuning.jobs.create(
            model="tiny-llama", training_file=file_id, metadata={"n": str(n), "odd": str(n % 2)}
        ).id
        for n in range(4)
    ]
    plain = client.fine_tuning.jobs.create(model="tiny-llama", training_file=file_id).id
    assert [job.id for job in client.fine_tuning.jobs.list(limit=2)] == [plain, *made[::-1]]
    assert [job.id for job in client.fine_tuning.jobs.list(metadata={"odd": "1"})] == [made[3], made[1]]
    without = client.fine_tuning.jobs.list(extra_query={"metadata": "null"})
    assert [job.id for job in without] == [plain]


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
    answer = _post(api, {"model": "tiny-llama", "training_file": file_id, name: "lora"})
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == (name, "invalid_type")
    assert error["message"].endswith("Send a JSON object.")


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"model": None}, "model", "invalid_type"),
        ({"model": "nope"}, "model", "model_not_available"),
        ({"training_file": "file-nope"}, "training_file", "invalid_value"),
        ({"learning_rate": 1}, "learning_rate", "unknown_parameter"),
        ({"body": 1}, "body", "unknown_parameter"),
        ({"suffix": "a" * 65}, "suffix", "invalid_value"),
        ({"suffix": "a:b"}, "suffix", "invalid_value"),
        ({"suffix": "a\r\nb"}, "suffix", "invalid_value"),
        ({"seed": -1}, "seed", "invalid_value"),
        ({"seed": 2**31}, "seed", "invalid_value"),
        ({"metadata": {"k": 1}}, "metadata.k", "invalid_type"),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata", "invalid_value"),
        ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs", "invalid_value"),
        ({"hyperparameters": {"n_epochs": 51}}, "hyperparameters.n_epochs", "invalid_value"),
        ({"hyperparameters": {"batch_size": 257}}, "hyperparameters.batch_size", "invalid_value"),
        (
            {"hyperparameters": {"learning_rate_multiplier": 0}},
            "hyperparameters.learning_rate_multiplier",
            "invalid_value",
        ),
        ({"method": {"type": "reinforcement"}}, "method.type", "unsupported_value"),
        ({"integrations": [{"type": "wandb"}]}, "integrations.0.wandb", "missing_required_parameter"),
        (
            {"integrations": [{"type": "wandb", "wandb": {"project": "p"}}]},
            "integrations.0.type",
            "unsupported_value",
        ),
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
def test_a_bad_create_names_its_field_and_makes_no_job(
    api: Api, client: openai.OpenAI, file_id: str, change: dict[str, Any], param: str, code: str | None
) -> None:
    answer = _post(api, {"model": "tiny-llama", "training_file": file_id} | change)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param), error
    assert code is None or error["code"] == code, error
    assert client.fine_tuning.jobs.list().data == []
    assert api.notified == []


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
    error = _post(api, {"model": "tiny-llama", "training_file": file_id} | change).json()["error"]
    assert error["message"].endswith(f"Did you mean '{meant}'?"), error


@pytest.mark.parametrize("name", ["zzz", "n_epochs" * 25_000])
def test_an_unknown_field_like_none_is_to_be_left_out(api: Api, name: str) -> None:
    error = _post(api, {"model": "m", "training_file": "f", name: 1}).json()["error"]
    assert error["message"].endswith("Leave it out.")


def test_nine_rows_are_too_few(api: Api, client: openai.OpenAI) -> None:
    few = client.files.create(file=("rows.jsonl", jsonl(colour_rows(9))), purpose="fine-tune")
    answer = _post(api, {"model": "tiny-llama", "training_file": few.id})
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("invalid_n_examples", "training_file")
    assert "9 rows" in error["message"]


def test_nulls_mean_unset_and_unused_method_members_are_ignored(api: Api, file_id: str) -> None:
    body = {
        "model": "tiny-llama",
        "training_file": file_id,
        **dict.fromkeys(("validation_file", "suffix", "seed", "metadata", "integrations", "tuning")),
        "method": {
            "type": "supervised",
            "supervised": {"hyperparameters": {"n_epochs": 2}},
            "dpo": {"hyperparameters": {"beta": "auto"}},
            "reinforcement": {"grader": {}},
        },
        "hyperparameters": {"batch_size": 4},
    }
    answer = _post(api, body)
    assert answer.status_code == 200, answer.text
    job = answer.json()
    assert job["hyperparameters"] == {"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": "auto"}
    assert job["method"]["supervised"]["hyperparameters"] == job["hyperparameters"]
    assert isinstance(job["seed"], int)


def test_reinforcement_and_its_graders_are_refused_in_clear_words(api: Api, file_id: str) -> None:
    body = {"model": "tiny-llama", "training_file": file_id, "method": {"type": "reinforcement"}}
    error = _post(api, body).json()["error"]
    assert (error["code"], error["param"]) == ("unsupported_value", "method.type")
    assert "reinforcement" in error["message"]
    assert "supervised" in error["message"]
    for grader in ("run", "validate"):
        url = f"{api.base_url}/v1/fine_tuning/alpha/graders/{grader}"
        answer = httpx2.post(url, headers=api.headers, json={"grader": {}})
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_url")


def test_an_idempotency_key_makes_one_job_however_often_it_is_sent(api: Api, file_id: str) -> None:
    body = {"model": "tiny-llama", "training_file": file_id}
    answers: list[httpx2.Response] = []
    threads = [
        threading.Thread(target=lambda: answers.append(_post(api, body, **{"Idempotency-Key": "one"})))
        for _ in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.json()["id"] for answer in answers}) == 1
    other = _post(api, body | {"suffix": "other"}, **{"Idempotency-Key": "one"})
    assert (other.status_code, other.json()["error"]["code"]) == (400, "idempotency_key_reused")


def test_the_sdks_silent_retry_makes_one_job(api: Api, file_id: str) -> None:
    body = {"model": "tiny-llama", "training_file": file_id}
    first = _post(api, body, **{"X-Stainless-Retry-Count": "0"}).json()["id"]
    again = _post(api, body, **{"X-Stainless-Retry-Count": "1"}).json()["id"]
    assert again == first
    meant = _post(api, body, **{"X-Stainless-Retry-Count": "0"}).json()["id"]
    assert meant != first


def test_what_is_no_route_or_no_json_is_reported_in_the_one_shape(api: Api) -> None:
    for method, path, content, status in (
        ("GET", "/v1/nothing", b"", 404),
        ("PUT", "/v1/files", b"", 405),
        ("POST", "/v1/fine_tuning/jobs", b"{", 400),
        ("POST", "/v1/fine_tuning/jobs", b"[]", 400),
        ("POST", "/v1/chat/completions", b"{", 400),
        ("POST", "/v1/chat/completions", b"{}", 400),
    ):
        answer = httpx2.request(method, api.base_url + path, headers=api.headers, content=content)
        assert answer.status_code == status, answer.text
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert answer.headers["x-request-id"]


def test_a_refused_method_is_answered_with_those_there_are(api: Api) -> None:
    for method, path, allowed in (
        ("PUT", "/v1/files", "GET, POST"),
        ("POST", "/v1/files/file-1", "DELETE, GET"),
        ("GET", "/v1/fine_tuning/jobs/ftjob-1/cancel", "POST"),
        ("GET", "/v1/chat/completions", "POST"),
    ):
        answer = httpx2.request(method, api.base_url + path, headers=api.headers)
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
    answer = httpx2.post(
        f"{api.base_url}/v1/chat/completions",
        headers=api.headers,
        json={"model": "gpt-4o-mini-2024-07-18", "messages": []},
    )
    assert answer.status_code == 200
    _, _, target = api.backend.asked[0]
    assert (target.base_id, target.model, target.digest) == ("tiny-llama", "gpt-4o-mini-2024-07-18", None)
    names = {model.id for model in client.models.list()}
    assert names == {"tiny-llama", "gpt-4o-mini-2024-07-18"}
    with pytest.raises(openai.PermissionDeniedError):
        client.models.delete("tiny-llama")


def test_a_client_that_leaves_stops_the_answer(api: Api) -> None:
    entered, cancelled = threading.Event(), threading.Event()

    async def never(path: str, body: bytes, target: object) -> object:
        entered.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    api.backend.complete = never  # type: ignore[method-assign, assignment]
    body = {"model": "tiny-llama", "messages": []}
    with pytest.raises(httpx2.ReadTimeout):
        httpx2.post(
            f"{api.base_url}/v1/chat/completions",
            headers=api.headers,
            json=body,
            timeout=httpx2.Timeout(10, read=0.5),
        )
    assert entered.is_set()
    assert cancelled.wait(timeout=5), "the inference server was not told"


def test_a_stream_that_breaks_off_ends_with_an_error_that_the_sdk_raises(
    api: Api, client: openai.OpenAI
) -> None:
    async def broken() -> AsyncGenerator[bytes]:
        yield b'data: {"id":"x","object":"chat.completion.chunk","created":1,"model":"m","choices":[]}\n\n'
        raise UnavailableError("The inference server left.")

    async def complete(path: str, body: bytes, target: object) -> Reply:
        return Reply(200, {"content-type": "text/event-stream"}, events=broken())

    api.backend.complete = complete  # type: ignore[method-assign, assignment]
    stream = client.chat.completions.create(
        model="tiny-llama", messages=[{"role": "user", "content": "hi"}], stream=True
    )
    with pytest.raises(openai.APIError, match="left"):
        list(stream)
