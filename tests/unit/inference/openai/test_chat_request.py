"""What clients may ask: accepted shapes, and the error that each fault gets."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from luthier.core.errors import InvalidRequestError, UnknownParameterError
from luthier.inference.openai.chat_request import parse_chat, parse_completion
from luthier.inference.openai.fields import IGNORED_FIELDS
from luthier.inference.openai.responses_request import parse_response

MISSING = "missing_required_parameter"
HELLO = [{"role": "user", "content": "Hello"}]


def _tool(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def _call(name: str, arguments: str) -> dict[str, Any]:
    return {"id": "call_1", "type": "function", "function": {"name": name, "arguments": arguments}}


def chat(**fields: Any) -> Any:
    return parse_chat(json.dumps({"model": "m", "messages": HELLO} | fields).encode())


def completion(**fields: Any) -> Any:
    return parse_completion(json.dumps({"model": "m", "prompt": "Hello"} | fields).encode())


def refusal(make: Callable[..., Any], fields: dict[str, Any]) -> tuple[str | None, str | None]:
    """Return the field and the code of a request's refusal."""
    with pytest.raises(InvalidRequestError) as caught:
        make(**fields)
    assert caught.value.http_status == 400
    return caught.value.param, caught.value.code


def test_a_minimal_chat_has_openais_defaults():
    request = chat()
    assert (request.temperature, request.top_p, request.max_tokens) == (1.0, 1.0, None)
    assert not request.stream and not request.logprobs and request.stop == ()


def test_null_means_unset_for_every_field():
    names = ["max_tokens", "max_completion_tokens", "temperature", "top_p", "n", "stop", "seed", "tools"]
    names += ["logprobs", "top_logprobs", "response_format", "stream", "stream_options", "logit_bias"]
    assert chat(**dict.fromkeys(names)) == chat()


def test_what_real_clients_send_and_we_have_no_use_for_is_ignored():
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
def test_values_that_mean_not_used_are_accepted(fields):
    assert chat(**fields) == chat()


def test_calls_of_tools_and_their_answers_become_messages_for_the_template():
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


@pytest.mark.parametrize(
    ("message", "param", "code"),
    [
        ({"role": "user"}, "content", MISSING),
        ({"role": "wizard", "content": "x"}, "role", "invalid_value"),
        ({"role": "user", "content": "x", "name": 7}, "name", "invalid_type"),
        ({"role": "function", "content": "x"}, "role", "unsupported_value"),
        ({"role": "tool", "content": "x"}, "tool_call_id", MISSING),
        ({"role": "user", "content": "x", "tool_calls": [{}]}, "tool_calls", "invalid_value"),
        (
            {"role": "assistant", "tool_calls": [{"id": "a", "type": "function"}]},
            "tool_calls.0.function",
            MISSING,
        ),
        (
            {"role": "assistant", "tool_calls": [_call("go", "{")]},
            "tool_calls.0.function.arguments",
            "invalid_value",
        ),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {}}]},
            "content.0.type",
            "unsupported_value",
        ),
    ],
)
def test_a_fault_of_a_message_names_its_field_and_its_kind(message, param, code):
    assert refusal(chat, {"messages": [message]}) == (f"messages.0.{param}", code)


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": "Hello"}, "messages", "invalid_type"),
        ({"temperature": 2.1}, "temperature", "invalid_value"),
        ({"temperature": "hot"}, "temperature", "invalid_type"),
        ({"temperature": True}, "temperature", "invalid_type"),
        ({"top_p": -0.1}, "top_p", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_tokens": 1.5}, "max_tokens", "invalid_type"),
        ({"max_completion_tokens": 5, "max_tokens": 6}, "max_completion_tokens", "invalid_value"),
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
        ({"tools": [{"type": "function"}]}, "tools.0.function", MISSING),
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
def test_a_fault_names_its_field_and_its_kind(fields, param, code):
    assert refusal(chat, fields) == (param, code)


def test_a_fault_never_repeats_what_the_client_wrote():
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
def test_text_that_no_tokenizer_takes_is_refused_by_the_name_of_its_field(fields, param, text):
    assert refusal(chat, fields(text)) == (param, "invalid_value")


def test_a_whole_pair_of_surrogates_is_one_character():
    request = parse_chat(b'{"model": "m", "messages": [{"role": "user", "content": "\\ud83d\\ude00"}]}')
    assert request.messages[0].content == "\N{GRINNING FACE}"


_NAN = b'{"model": "m", "messages": [{"role": "user", "content": ""}], "temperature": NaN}'


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"x"', b"\xff", b"[" * 100_000, _NAN])
def test_a_body_that_is_no_json_object_is_refused(body):
    with pytest.raises(InvalidRequestError):
        parse_chat(body)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("Hi", ["Hi"]), (["Hi", "Ho"], ["Hi", "Ho"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_a_completion_takes_all_four_shapes_of_prompts(prompt, expected):
    assert completion(prompt=prompt).prompt == expected


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"prompt": []}, "prompt", "invalid_value"),
        ({"prompt": "\ud800"}, "prompt", "invalid_value"),
        ({"prompt": "a\x00"}, "prompt", "invalid_value"),
        ({"prompt": ["a", "\udfff"]}, "prompt.1", "invalid_value"),
        ({"prompt": ["Hi", {"a": 1}]}, "prompt.1", "invalid_type"),
        ({"prompt": None}, "prompt", MISSING),
        ({"suffix": "x"}, "suffix", "unsupported_value"),
        ({"prompt": ["a"] * 65, "n": 2}, "n", "invalid_value"),
        ({"logprobs": 6}, "logprobs", "invalid_value"),
        ({"logprobs": True}, "logprobs", "invalid_type"),
        ({"best_of": 2}, "best_of", "unsupported_value"),
    ],
)
def test_a_completions_fault_names_its_field(fields, param, code):
    assert refusal(completion, fields) == (param, code)


@pytest.mark.parametrize(
    ("fields", "message"),
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
def test_a_refusal_says_what_to_do(fields, message):
    with pytest.raises(InvalidRequestError) as caught:
        chat(**fields)
    assert caught.value.message == message


def test_a_field_of_another_endpoint_is_refused_with_its_name_here():
    with pytest.raises(UnknownParameterError, match="Did you mean 'max_output_tokens'"):
        parse_response(b'{"model": "m", "input": "hi", "max_tokens": 5}')
