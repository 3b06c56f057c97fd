"""What real clients of the chat surface break on if a server is sloppy: a test for each such sentence.

The SDK, the real API, the real inference server and the tiny base. The numbers are those of the list that the
project keeps; sentences about jobs, files and lists are held in tests/integration/test_client_breakages*.py.
"""

import json
import threading
from typing import Any

import httpx2
import openai
import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params
from pydantic import BaseModel

from luthier.core.errors import UnavailableError
from luthier.inference.engine.scheduler import NgramProposer
from luthier.inference.engine.sequence import Sequence
from tests.conftest import Api
from tests.tools_base import TOOLS_BASE_ID

ALIAS = "gpt-4o-mini-2024-07-18"
SKY: list[Any] = [{"role": "user", "content": "the sky"}]
TOOL: Any = {
    "type": "function",
    "function": {"name": "go", "parameters": {"type": "object", "additionalProperties": False}},
}


@pytest.fixture(scope="module")
def api(chat_api: Api) -> Api:
    return chat_api


@pytest.fixture(scope="module")
def client(api: Api) -> openai.OpenAI:
    return api.client()


def post(api: Api, path: str = "/chat/completions", **body: Any) -> httpx2.Response:
    fields = {"model": "tiny-llama", "temperature": 0, "max_tokens": 8} | body
    if path == "/chat/completions":
        fields = {"messages": SKY} | fields
    return api.ask("POST", path, fields, timeout=60)


def chunks_of(response: httpx2.Response) -> list[Any]:
    assert response.status_code == 200, response.text
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


def test_10_11_faults_are_400_in_the_one_shape_that_node_shows_too(api: Api, client: openai.OpenAI) -> None:
    for body in ({"temperature": 9}, {"messages": []}, {"wizardry": 1}, {"messages": [{"role": "user"}]}):
        response = post(api, **body)
        assert response.status_code == 400
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny-llama", messages=SKY, top_p=7)
    assert (caught.value.param, caught.value.code) == ("top_p", "invalid_value")
    assert post(api, model="none").status_code == 404


def test_12_a_prompt_that_can_never_fit_is_no_status_that_is_repeated(client: openai.OpenAI) -> None:
    long: Any = [{"role": "user", "content": "z" * 400}]
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny-llama", messages=long)
    assert caught.value.code == "context_length_exceeded"


def test_15_null_equals_absent(api: Api) -> None:
    names = ["n", "stop", "seed", "tools", "tool_choice", "parallel_tool_calls", "response_format", "stream"]
    names += ["logit_bias", "presence_penalty", "frequency_penalty", "logprobs", "stream_options", "user"]
    texts = [post(api, **body).json()["choices"] for body in ({}, dict.fromkeys(names))]
    assert texts[0] == texts[1]


def test_26_the_model_of_the_reply_is_the_requested_name(client: openai.OpenAI) -> None:
    for model in ("tiny-llama", ALIAS):
        options: Any = {"model": model, "messages": SKY, "max_tokens": 1}
        assert client.chat.completions.create(**options).model == model
        assert {chunk.model for chunk in client.chat.completions.create(stream=True, **options)} == {model}
        assert client.completions.create(model=model, prompt="a", max_tokens=1).model == model
        assert client.responses.create(model=model, input="a", max_output_tokens=1).model == model


def test_27_a_stream_flushes_every_token_unbuffered_uncompressed_and_ends_with_done(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_read, accept = threading.Event(), Sequence.accept

    def wait_at_fifth(self: Any, choice: Any) -> None:
        if self.num_completion_tokens == 4:
            assert has_read.wait(30), "the fourth token was not sent before the fifth"
        accept(self, choice)

    monkeypatch.setattr(Sequence, "accept", wait_at_fifth)
    # Tokens of one step leave together; here each is a step's only one.
    monkeypatch.setattr(NgramProposer, "propose", lambda *_args, **_options: [])
    body = {
        "model": "tiny-llama",
        "messages": SKY,
        "stream": True,
        "max_tokens": 8,
        "logit_bias": {"40": 100},
    }
    headers = api.headers | {"Accept-Encoding": "gzip, deflate"}
    url = f"{api.base_url}/v1/chat/completions"
    with httpx2.stream("POST", url, json=body, headers=headers, timeout=60) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert "content-encoding" not in response.headers
        text = ""
        for piece in response.iter_raw():
            text += piece.decode()
            if text.count('"content"') == 5:
                has_read.set()
    events = text.split("\n\n")
    assert all(event.startswith("data: {") and "\n" not in event for event in events[:-2])
    assert events[-2:] == ["data: [DONE]", ""]


def test_28_usage_comes_only_on_request_in_a_chunk_of_its_own_and_is_null_elsewhere(api: Api) -> None:
    for path, prompt in (("/chat/completions", {}), ("/completions", {"prompt": "the sky"})):
        plain = chunks_of(post(api, path, stream=True, **prompt))
        assert all(chunk["choices"] and not chunk.get("usage") for chunk in plain)
        options = {"include_usage": True}
        *chunks, last = chunks_of(post(api, path, stream=True, stream_options=options, n=2, **prompt))
        assert all(chunk["choices"] and chunk["usage"] is None for chunk in chunks)
        assert last["choices"] == [] and last["usage"]["completion_tokens"] == 16
        usage = last["usage"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_29_the_first_delta_has_the_role_and_the_finish_chunk_an_empty_delta(api: Api) -> None:
    chunks = chunks_of(post(api, stream=True, n=2))
    assert len({(chunk["id"], chunk["created"], chunk["object"]) for chunk in chunks}) == 1
    for index in range(2):
        choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert choices[0]["delta"]["role"] == "assistant" and choices[0]["delta"]["content"] == ""
        assert choices[-1]["delta"] == {} and choices[-1]["finish_reason"] == "length"
        assert all(choice["finish_reason"] is None for choice in choices[:-1])
        assert all("role" not in choice["delta"] for choice in choices[1:])


def test_30_deltas_of_tool_calls_carry_an_index_the_id_once_and_arguments_as_text(api: Api) -> None:
    options = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 80}
    answer = post(api, model=TOOLS_BASE_ID, **options)
    assert answer.status_code == 200, answer.text
    message = answer.json()["choices"][0]["message"]
    assert message["content"] is None and isinstance(message["tool_calls"][0]["function"]["arguments"], str)
    chunks = chunks_of(post(api, model=TOOLS_BASE_ID, stream=True, **options))
    choices = [chunk["choices"][0] for chunk in chunks]
    calls = [call for choice in choices for call in choice["delta"].get("tool_calls", [])]
    assert [call["index"] for call in calls] == [0] * len(calls)
    assert calls[0]["id"] and calls[0]["type"] == "function" and calls[0]["function"]["name"] == "go"
    assert all("id" not in call and "name" not in call["function"] for call in calls[1:])
    arguments = "".join(call["function"]["arguments"] for call in calls)
    assert arguments == message["tool_calls"][0]["function"]["arguments"] and json.loads(arguments) == {}
    assert choices[-1]["finish_reason"] == "tool_calls"
    assert not any(choice["delta"].get("content") for choice in choices)


class _Colour(BaseModel):
    name: str
    notes: list[str]


def test_31_an_answer_that_is_cut_says_length_and_the_sdks_parse_raises_by_it(client: openai.OpenAI) -> None:
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(
            model="tiny-llama", messages=SKY, response_format=_Colour, max_tokens=3, temperature=0
        )


@pytest.mark.parametrize(
    ("path", "params", "needed"),
    [
        ("/chat/completions", chat_create_params.CompletionCreateParamsBase, {"messages": SKY}),
        ("/completions", completion_create_params.CompletionCreateParamsBase, {"prompt": "a"}),
        ("/responses", response_create_params.ResponseCreateParamsBase, {"input": "a"}),
    ],
)
def test_32_no_member_that_the_newest_sdk_can_send_is_unknown(
    api: Api, path: str, params: Any, needed: dict[str, Any]
) -> None:
    for name in params.__annotations__:
        # A value that nothing takes: known members say what is wrong with it, if they mind.
        limit = "max_output_tokens" if path == "/responses" else "max_tokens"
        body = {"model": "tiny-llama", limit: 1} | needed | {name: {"of": "no type"}}
        response = api.ask("POST", path, body, timeout=60)
        if response.status_code != 200:
            error = response.json()["error"]
            assert response.status_code == 400, (name, error)
            assert (error["code"], error["param"]) != ("unknown_parameter", name)


def test_32_what_frameworks_send_unasked_is_accepted(client: openai.OpenAI) -> None:
    options: Any = {
        "parallel_tool_calls": True,
        "store": False,
        "service_tier": "auto",
        "prompt_cache_key": "k",
        "reasoning_effort": "low",
        "metadata": {"a": "b"},
        "user": "u",
        "stream_options": {"include_usage": True},
    }
    stream = client.chat.completions.create(
        model="tiny-llama", messages=SKY, max_tokens=2, stream=True, **options
    )
    assert list(stream)[-1].usage


def test_33_developers_parts_and_null_content_become_the_templates_turns(api: Api) -> None:
    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "sky"}]
    written = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None},
        {"role": "user", "content": parts},
    ]
    plain = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "the sky"},
    ]
    answers = [post(api, messages=messages).json() for messages in (written, plain)]
    assert answers[0]["choices"] == answers[1]["choices"] and answers[0]["usage"] == answers[1]["usage"]


def test_an_unknown_role_is_refused_with_those_there_are(api: Api) -> None:
    response = post(api, messages=[{"role": "boss", "content": "a"}])
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "messages.0.role")
    assert "system, developer, user, assistant, tool" in error["message"]


def test_34_log_probabilities_are_finite_their_alternatives_a_list_and_bytes_integers(api: Api) -> None:
    # A bias makes the model write tokens that it would never have written itself.
    body = {"logprobs": True, "logit_bias": {"40": 100}, "max_tokens": 4}
    for extra, num_top in (({}, 0), ({"top_logprobs": 0}, 0), ({"top_logprobs": 20}, 20)):
        response = post(api, **body, **extra)
        assert "NaN" not in response.text and "Infinity" not in response.text
        content = response.json()["choices"][0]["logprobs"]["content"]
        assert len(content) == 4
        for item in content:
            assert len(item["top_logprobs"]) == num_top and item["logprob"] <= 0
            assert all(isinstance(byte, int) for byte in item["bytes"])


def test_35_both_names_of_the_limit_count_and_completions_default_to_sixteen(api: Api) -> None:
    bias = {"logit_bias": {"40": 100}}
    for limit in ({"max_tokens": 3}, {"max_completion_tokens": 3, "max_tokens": None}):
        answer = post(api, **bias, **limit).json()
        assert answer["usage"]["completion_tokens"] == 3
        assert answer["choices"][0]["finish_reason"] == "length"
    default = post(api, "/completions", prompt="a", max_tokens=None, **bias).json()
    assert default["usage"]["completion_tokens"] == 16


def test_36_usage_is_in_every_whole_reply_and_adds_up(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(model="tiny-llama", messages=SKY, n=2, max_tokens=3)
    text = client.completions.create(model="tiny-llama", prompt=["a", "b"], max_tokens=3)
    for usage in (chat.usage, text.usage):
        assert usage and usage.total_tokens == usage.prompt_tokens + usage.completion_tokens > 0


def test_37_a_failure_in_a_stream_is_an_error_that_the_sdk_raises_and_one_before_it_a_status(
    client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    accept = Sequence.accept
    fails_at = 3

    def fail(self: Any, choice: Any) -> None:
        if self.num_completion_tokens == fails_at:
            self.fail(UnavailableError("It broke."))
        accept(self, choice)

    monkeypatch.setattr(Sequence, "accept", fail)
    options: Any = {"model": "tiny-llama", "messages": SKY, "logit_bias": {"40": 100}}
    stream = client.chat.completions.create(stream=True, **options)
    with pytest.raises(openai.APIError, match="It broke"):
        list(stream)
    with pytest.raises(openai.InternalServerError):
        client.chat.completions.create(**options)
    fails_at = 0
    with pytest.raises(openai.InternalServerError):
        client.chat.completions.create(stream=True, **options)


def test_45_a_request_id_is_on_every_reply(api: Api, client: openai.OpenAI) -> None:
    assert client.chat.completions.create(model="tiny-llama", messages=SKY, max_tokens=1)._request_id
    for body in ({"stream": True}, {"temperature": 9}, {"model": "none"}):
        assert post(api, **body).headers["x-request-id"].startswith("req_")


def test_48_a_refusal_leaves_the_connection_usable_after_a_large_body(api: Api) -> None:
    with httpx2.Client(base_url=f"{api.base_url}/v1", timeout=60) as kept:
        large = {"model": "tiny-llama", "messages": [{"role": "user", "content": "the sky " * 100_000}]}
        for headers, status in (({}, 401), ({"Authorization": "Bearer x"}, 401), (api.headers, 400)):
            assert kept.post("/chat/completions", json=large, headers=headers).status_code == status
            assert kept.get("/models", headers=api.headers).status_code == 200


def test_characters_are_never_cut_in_a_stream(api: Api) -> None:
    # The tiny tokenizer has a token for each byte of these characters.
    text = "\N{EURO SIGN}\N{SLIGHTLY SMILING FACE}\N{LATIN SMALL LETTER E WITH ACUTE}"
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"enum": [text]}}}
    chunks = chunks_of(post(api, stream=True, max_tokens=60, response_format=form))
    texts = [chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks]
    assert json.loads("".join(texts)) == text
    assert all(letter in texts for letter in text)
