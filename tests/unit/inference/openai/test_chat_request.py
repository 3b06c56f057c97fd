"""What clients may ask: accepted shapes, and the error that each fault gets."""

import json
from typing import Any

import pytest

from luthier.core.errors import InvalidRequestError, UnknownParameterError
from luthier.inference.openai.chat_request import parse_chat, parse_completion
from luthier.inference.openai.fields import IGNORED_FIELDS
from luthier.inference.openai.responses_request import parse_response

HELLO = [{"role": "user", "content": "Hello"}]


def _tool(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def _call(name: str, arguments: str) -> dict[str, Any]:
    return {"id": "call_1", "type": "function", "function": {"name": name, "arguments": arguments}}


def chat(**fields: Any) -> Any:
    return parse_chat(json.dumps({"model": "m", "messages": HELLO} | fields).encode())


def completion(**fields: Any) -> Any:
    return parse_completion(json.dumps({"model": "m", "prompt": "Hello"} | fields).encode())


def test_a_minimal_chat_has_openais_defaults() -> None:
    request = chat()
    assert (request.temperature, request.top_p, request.max_tokens) == (1.0, 1.0, None)
    assert not request.stream and not request.logprobs and request.stop == ()


def test_null_means_unset_for_every_field() -> None:
    names = ["max_tokens", "max_completion_tokens", "temperature", "top_p", "n", "stop", "seed", "tools"]
    names += ["logprobs", "top_logprobs", "response_format", "stream", "stream_options", "logit_bias"]
    assert chat(**dict.fromkeys(names)) == chat()


def test_what_real_clients_send_and_we_have_no_use_for_is_ignored() -> None:
    assert chat(**dict.fromkeys(IGNORED_FIELDS, "x")) == chat()


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 1},
        {"frequency_penalty": 0, "presence_penalty": 0.0},
        {"tools": [], "tool_choice": "none"},
        {"response_format": {"type": "text"}},
        {"logit_bias": {}},
        {"modalities": ["text"]},
    ],
)
def test_values_that_mean_not_used_are_accepted(fields: dict[str, Any]) -> None:
    assert chat(**fields) == chat()


def test_content_parts_and_the_developer_role_become_plain_messages() -> None:
    parts = [{"type": "text", "text": "Good "}, {"type": "text", "text": "day"}]
    request = chat(
        messages=[
            {"role": "developer", "content": "Be kind."},
            {"role": "user", "content": parts, "name": "Ann"},
            {"role": "assistant", "content": None, "refusal": None, "annotations": [], "tool_calls": None},
            {"role": "user", "content": "?"},
        ]
    )
    assert [message.to_message() for message in request.messages] == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Good day", "name": "Ann"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "?"},
    ]


def test_calls_of_tools_and_their_answers_become_messages_for_the_template() -> None:
    # As a client sends back what it put together from a stream, null and index included.
    calling = {"role": "assistant", "content": None, "tool_calls": [_call("go", "{}") | {"index": 0}]}
    parts = [{"type": "text", "text": "4"}, {"type": "text", "text": "2"}]
    answering = {"role": "tool", "tool_call_id": "call_1", "content": parts}
    request = chat(messages=[*HELLO, calling, answering], tools=[_tool("go")])
    assert [message.to_message() for message in request.messages[1:]] == [
        {"role": "assistant", "content": None, "tool_calls": [_call("go", "{}")]},
        {"role": "tool", "content": "42", "tool_call_id": "call_1"},
    ]
    assert request.tools.offered[0].definition == _tool("go")
    assert not chat(tools=[_tool("go")], tool_choice="none").tools.offered


def test_both_names_of_the_answers_length_are_honoured_and_must_agree() -> None:
    assert chat(max_completion_tokens=5).max_tokens == 5
    assert chat(max_completion_tokens=5, max_tokens=5).max_tokens == 5
    with pytest.raises(InvalidRequestError) as caught:
        chat(max_completion_tokens=5, max_tokens=6)
    assert caught.value.param == "max_completion_tokens"


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": "Hello"}, "messages", "invalid_type"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "missing_required_parameter"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages.0.role", "invalid_value"),
        ({"messages": [{"role": "user", "content": "x", "name": 7}]}, "messages.0.name", "invalid_type"),
        ({"messages": [{"role": "function", "content": "x"}]}, "messages.0.role", "unsupported_value"),
        (
            {"messages": [{"role": "tool", "content": "x"}]},
            "messages.0.tool_call_id",
            "missing_required_parameter",
        ),
        (
            {"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]},
            "messages.0.tool_calls",
            "invalid_value",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"id": "a", "type": "function"}]}]},
            "messages.0.tool_calls.0.function",
            "missing_required_parameter",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [_call("go", "{")]}]},
            "messages.0.tool_calls.0.function.arguments",
            "invalid_value",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages.0.content.0.type",
            "unsupported_value",
        ),
        ({"temperature": 2.1}, "temperature", "invalid_value"),
        ({"temperature": "hot"}, "temperature", "invalid_type"),
        ({"temperature": True}, "temperature", "invalid_type"),
        ({"top_p": -0.1}, "top_p", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_tokens": 1.5}, "max_tokens", "invalid_type"),
        ({"seed": 2**63}, "seed", "invalid_value"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "invalid_value"),
        ({"stop": 7}, "stop", "invalid_type"),
        ({"top_logprobs": 3}, "top_logprobs", "invalid_value"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"n": 129}, "n", "invalid_value"),
        ({"n": True}, "n", "invalid_type"),
        ({"frequency_penalty": 2.5}, "frequency_penalty", "invalid_value"),
        ({"presence_penalty": "0.5"}, "presence_penalty", "invalid_type"),
        ({"logit_bias": [1]}, "logit_bias", "invalid_type"),
        ({"logit_bias": {"cat": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5", "invalid_value"),
        ({"logit_bias": {"5": True}}, "logit_bias.5", "invalid_type"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias", "invalid_value"),
        ({"tools": [{"type": "function"}]}, "tools.0.function", "missing_required_parameter"),
        ({"tools": [{"type": "custom", "custom": {}}]}, "tools.0.type", "unsupported_value"),
        ({"tools": [_tool("a b")]}, "tools.0.function.name", "invalid_value"),
        ({"tools": [_tool("a"), _tool("a")]}, "tools.1", "invalid_value"),
        ({"tools": [_tool("a")] * 129}, "tools", "invalid_value"),
        ({"tools": {}}, "tools", "invalid_type"),
        ({"tools": [_tool("a")], "tool_choice": "always"}, "tool_choice", "invalid_value"),
        ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
        (
            {"tools": [_tool("a")], "tool_choice": {"type": "function", "function": {"name": "b"}}},
            "tool_choice.function.name",
            "invalid_value",
        ),
        (
            {"tools": [_tool("a")], "tool_choice": {"type": "allowed_tools"}},
            "tool_choice.type",
            "unsupported_value",
        ),
        ({"functions": [{"name": "a"}]}, "functions", "unsupported_value"),
        ({"wizardry": 1}, "wizardry", "unknown_parameter"),
    ],
)
def test_a_fault_names_its_field_and_its_kind(fields: dict[str, Any], param: str, code: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        chat(**fields)
    assert (caught.value.param, caught.value.code) == (param, code)
    assert caught.value.http_status == 400


def test_a_fault_never_repeats_what_the_client_wrote() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        chat(messages=[{"role": "user", "content": {"secret": "my password is swordfish"}}])
    assert "swordfish" not in caught.value.message


@pytest.mark.parametrize("text", ["a\ud800", "\udc00a", "\ude00\ud83d", "a\x00b"])
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        (lambda text: {"messages": [{"role": "user", "content": text}]}, "messages.0.content"),
        (
            lambda text: {
                "messages": [*HELLO, {"role": "user", "content": [{"type": "text", "text": text}]}]
            },
            "messages.1.content.0.text",
        ),
        (lambda text: {"messages": [*HELLO, {"role": text, "content": "a"}]}, "messages.1.role"),
        (lambda text: {"messages": [{"role": "user", "content": "a", text: 1}]}, "messages.0"),
        (lambda text: {"stop": text}, "stop"),
        (lambda text: {"stop": ["a", text]}, "stop.1"),
        (lambda text: {"model": text}, "model"),
        (lambda text: {text: 1}, None),
    ],
)
def test_text_that_no_tokenizer_takes_is_refused_by_the_name_of_its_field(
    fields: Any, param: str | None, text: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        chat(**fields(text))
    assert (caught.value.param, caught.value.code) == (param, "invalid_value")


@pytest.mark.parametrize(
    ("prompt", "param"), [("\ud800", "prompt"), ("a\x00", "prompt"), (["a", "\udfff"], "prompt.1")]
)
def test_a_prompt_that_no_tokenizer_takes_is_refused(prompt: Any, param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        completion(prompt=prompt)
    assert (caught.value.param, caught.value.code) == (param, "invalid_value")


def test_a_whole_pair_of_surrogates_is_one_character() -> None:
    request = parse_chat(b'{"model": "m", "messages": [{"role": "user", "content": "\\ud83d\\ude00"}]}')
    assert request.messages[0].content == "\N{GRINNING FACE}"


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"x"', b"\xff", b"[" * 100_000])
def test_a_body_that_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequestError):
        parse_chat(body)


def test_infinity_is_no_temperature() -> None:
    with pytest.raises(InvalidRequestError):
        parse_chat(b'{"model": "m", "messages": [{"role": "user", "content": ""}], "temperature": NaN}')


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("Hi", ["Hi"]), (["Hi", "Ho"], ["Hi", "Ho"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_a_completion_takes_all_four_shapes_of_prompts(prompt: Any, expected: Any) -> None:
    assert completion(prompt=prompt).prompt == expected


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"prompt": []}, "prompt", "invalid_value"),
        ({"prompt": None}, "prompt", "missing_required_parameter"),
        ({"suffix": "x"}, "suffix", "unsupported_value"),
        ({"prompt": ["a"] * 65, "n": 2}, "n", "invalid_value"),
        ({"logprobs": 6}, "logprobs", "invalid_value"),
        ({"logprobs": True}, "logprobs", "invalid_type"),
        ({"best_of": 2}, "best_of", "unsupported_value"),
    ],
)
def test_a_completions_fault_names_its_field(fields: dict[str, Any], param: str, code: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        completion(**fields)
    assert (caught.value.param, caught.value.code) == (param, code)


def test_a_prompt_of_the_wrong_type_names_its_position() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        completion(prompt=["Hi", {"a": 1}])
    assert caught.value.param == "prompt.1"


def test_completions_default_to_sixteen_tokens() -> None:
    assert completion().max_tokens == 16


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"temperature_": 1}, "Unknown parameter: 'temperature_'. Did you mean 'temperature'?"),
        ({"colour": 1}, "Unknown parameter: 'colour'. Leave it out."),
        (
            {"stream": True, "stream_options": {"usage": 1}},
            "Unknown parameter: 'stream_options.usage'. Leave it out.",
        ),
        ({"stop": list("abcde")}, "stop: send at most 4 entries."),
        ({"messages": []}, "messages: send at least 1 of them."),
        ({"messages": None}, "Missing required parameter: 'messages'."),
    ],
)
def test_a_refusal_says_what_to_do(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        chat(**fields)
    assert caught.value.message == told


def test_a_field_of_another_endpoint_is_told_by_its_name_here() -> None:
    with pytest.raises(UnknownParameterError, match="Did you mean 'max_output_tokens'"):
        parse_response(b'{"model": "m", "input": "hi", "max_tokens": 5}')
