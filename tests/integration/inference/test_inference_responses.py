"""/v1/responses as the SDK's quickstart uses it, whole and streamed, every reply checked by its types."""

import json
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel

from luthier.core.errors import UnavailableError
from tests.inference_server import Served, prompt_ids

PATH = "/v1/responses"
GO: Any = {
    "type": "function",
    "name": "go",
    "description": "Go.",
    "parameters": {"type": "object", "additionalProperties": False},
    "strict": True,
}


class Colour(BaseModel):
    name: Literal["red", "green"]


def test_the_quickstart_answers_as_a_chat_does(sdk: openai.OpenAI, served: Served, base_folder: Path) -> None:
    chat = served.chat("the sky", max_tokens=12)
    response = sdk.responses.create(
        model="m", input="the sky", max_output_tokens=12, temperature=0, metadata={"a": "b"}, store=True
    )
    assert response.output_text == chat["choices"][0]["message"]["content"]
    assert response.id.startswith("resp_") and response.object == "response" and response.model == "my-base"
    assert response.metadata == {"a": "b"} and response.temperature == 0 and response.error is None
    assert response.usage.input_tokens == len(prompt_ids(base_folder, "the sky"))
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens
    # Twelve tokens are all that it was given.
    assert response.status == "incomplete" and response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.output[0].type == "message" and response.output[0].status == "incomplete"


def test_instructions_and_items_are_the_messages_of_a_chat(sdk: openai.OpenAI, served: Served) -> None:
    messages: list[Any] = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "the sky"},
    ]
    chat = served.post("/v1/chat/completions", messages=messages, max_tokens=9, temperature=0).json()
    first = sdk.responses.create(model="m", input="x", max_output_tokens=1)
    output: Any = first.output[0].model_dump()
    output["content"][0]["text"] = "b"
    items: list[Any] = [
        {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
        output,
        {"type": "message", "role": "user", "content": "the sky"},
    ]
    response = sdk.responses.create(
        model="m", input=items, instructions="Be kind.", max_output_tokens=9, temperature=0
    )
    assert response.output_text == chat["choices"][0]["message"]["content"]
    assert response.instructions == "Be kind."


def test_a_stream_has_every_event_in_order_and_comes_to_the_whole_response(sdk: openai.OpenAI) -> None:
    options: Any = {"model": "m", "input": "the sky", "max_output_tokens": 12, "temperature": 0}
    whole = sdk.responses.create(**options)
    events = list(sdk.responses.create(stream=True, **options))
    kinds = [event.type for event in events]
    deltas = kinds.count("response.output_text.delta")
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * deltas,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert deltas > 5
    assert [event.sequence_number for event in events] == list(range(len(events)))
    texts = [event.delta for event in events if event.type == "response.output_text.delta"]
    last = events[-1]
    assert last.type == "response.incomplete"
    assert "".join(texts) == last.response.output_text == whole.output_text
    assert last.response.usage == whole.usage


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_models_form_is_parsed_and_log_probabilities_are_there_when_asked_for(
    sdk: openai.OpenAI, is_stream: bool
) -> None:
    options: Any = {"model": "m", "input": "the sky", "text_format": Colour, "top_logprobs": 2}
    if is_stream:
        with sdk.responses.stream(**options) as stream:
            list(stream)
            response = stream.get_final_response()
    else:
        response = sdk.responses.parse(**options)
    assert isinstance(response.output_parsed, Colour) and response.status == "completed"
    message = response.output[0]
    assert message.type == "message" and message.content[0].type == "output_text"
    logprobs = message.content[0].logprobs or []
    assert "".join(item.token for item in logprobs) == response.output_text
    assert all(len(item.top_logprobs) == 2 for item in logprobs)


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_call_of_a_tool_comes_out_and_goes_in_again_with_its_answer(
    sdk_with_tools: openai.OpenAI, is_stream: bool
) -> None:
    asked: Any = {"model": "m", "input": "the sky", "tools": [GO], "tool_choice": "required"}
    asked["parallel_tool_calls"] = False
    if is_stream:
        with sdk_with_tools.responses.stream(**asked) as stream:
            kinds = [event.type for event in stream]
            response: Any = stream.get_final_response()
        assert kinds.count("response.output_item.added") == kinds.count("response.output_item.done") == 1
        assert "response.function_call_arguments.delta" in kinds and "response.output_text.delta" not in kinds
    else:
        response = sdk_with_tools.responses.create(**asked)
    [call] = response.output
    assert call.type == "function_call" and call.name == "go" and json.loads(call.arguments) == {}
    assert call.status == "completed" and response.status == "completed"
    items: list[Any] = [
        {"role": "user", "content": "the sky"},
        call,
        {"type": "function_call_output", "call_id": call.call_id, "output": "gone"},
    ]
    again = sdk_with_tools.responses.create(model="m", input=items, tools=[GO], max_output_tokens=5)
    assert again.usage and response.usage and again.usage.input_tokens > response.usage.input_tokens
    assert again.output_text


def test_a_stream_that_breaks_off_says_so(sdk: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    from luthier.inference.engine.sequence import Sequence

    accept = Sequence.accept

    def fail_at_third(self: Any, choice: Any) -> None:
        if self.num_completion_tokens == 3:
            self.fail(UnavailableError("It broke."))
        accept(self, choice)

    monkeypatch.setattr(Sequence, "accept", fail_at_third)
    events = list(sdk.responses.create(model="m", input="the sky", stream=True, temperature=0))
    failed = events[-1]
    assert [event.type for event in events[-2:]] == ["error", "response.failed"]
    assert failed.type == "response.failed" and failed.response.error is not None
    assert failed.response.status == "failed" and failed.response.error.message == "It broke."


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": 7}, "input"),
        ({"input": "z" * 900}, "input"),
        ({"input": [{"role": "wizard", "content": "a"}]}, "input.0.role"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content.0.type"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input.0.type"),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "go"}]}, "input.0.arguments"),
        ({"input": "a", "previous_response_id": "resp_1"}, "previous_response_id"),
        ({"input": "a", "conversation": "conv_1"}, "conversation"),
        ({"input": "a", "background": True}, "background"),
        ({"input": "a", "truncation": "auto"}, "truncation"),
        ({"input": "a", "include": ["file_search_call.results"]}, "include.0"),
        ({"input": "a", "tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"input": "a", "tools": [GO]}, "tools"),
        ({"input": "a", "text": {"format": {"type": "json_schema", "schema": {}}}}, "text.format.name"),
        (
            {"input": "a", "text": {"format": {"type": "json_schema", "name": "a", "schema": {"not": {}}}}},
            "text.format.schema",
        ),
        ({"input": "a", "max_output_tokens": 0}, "max_output_tokens"),
        ({"input": "a", "wizardry": 1}, "wizardry"),
    ],
)
def test_a_response_that_cannot_be_given_is_refused_by_the_name_of_its_field(
    served: Served, body: dict[str, Any], param: str
) -> None:
    response = served.post(PATH, **body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
