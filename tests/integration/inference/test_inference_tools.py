"""Tools by the SDK: definitions go in, calls come out, whole and streamed, and their answers go in again."""

import json
from typing import Any

import openai
import pytest

from tests.inference_server import CHAT, Served
from tests.tools_base import WITH_TOOLS

ASKED: list[Any] = [{"role": "user", "content": "the sky"}]
LOOK: Any = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Look at something.",
        "parameters": {
            "type": "object",
            "properties": {"at": {"enum": ["sky", "sea"]}, "times": {"enum": [1, 2, 3]}},
            "required": ["at", "times"],
            "additionalProperties": False,
        },
    },
}
GO: Any = {
    "type": "function",
    "function": {"name": "go", "parameters": {"type": "object", "additionalProperties": False}},
}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_required_call_is_the_same_streamed(sdk_with_tools: openai.OpenAI, temperature: float) -> None:
    options: dict[str, Any] = {
        "model": "m",
        "messages": ASKED,
        "tools": [LOOK, GO],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "temperature": temperature,
        "seed": 5,
        "n": 2,
        "max_tokens": 200,
    }
    whole = sdk_with_tools.chat.completions.create(**options)
    with sdk_with_tools.chat.completions.stream(**options) as stream:
        for _ in stream:
            pass
        streamed = stream.get_final_completion()
    for answer in (whole, streamed):
        for choice in answer.choices:
            assert choice.finish_reason == "tool_calls" and choice.message.content is None
            [call] = choice.message.tool_calls or []
            assert call.type == "function" and call.id.startswith("call_")
            arguments = json.loads(call.function.arguments)
            assert arguments == {} or (arguments["at"] in {"sky", "sea"} and arguments["times"] in {1, 2, 3})
    calls = [
        [
            (call.function.name, call.function.arguments)
            for choice in answer.choices
            for call in choice.message.tool_calls or []
            if call.type == "function"
        ]
        for answer in (whole, streamed)
    ]
    assert calls[0] == calls[1]


def test_a_named_function_is_called_and_its_call_and_answer_go_in_again(
    sdk_with_tools: openai.OpenAI, served: Served
) -> None:
    named: Any = {"type": "function", "function": {"name": "go"}}
    first = sdk_with_tools.chat.completions.create(
        model="m", messages=ASKED, tools=[LOOK, GO], tool_choice=named, max_tokens=100
    )
    message = first.choices[0].message
    [call] = message.tool_calls or []
    assert call.type == "function" and call.function.name == "go"
    assert json.loads(call.function.arguments) == {}
    answering = {"role": "tool", "tool_call_id": call.id, "content": "gone"}
    # The message as the SDK made it, which is what its users append.
    again = sdk_with_tools.chat.completions.create(
        model="m", messages=[*ASKED, message, answering], tools=[LOOK, GO], max_tokens=5
    )
    assert again.choices[0].message.role == "assistant"
    alone = sdk_with_tools.chat.completions.create(model="m", messages=ASKED, tools=[GO], max_tokens=1)
    assert again.usage and first.usage and alone.usage
    assert again.usage.prompt_tokens > first.usage.prompt_tokens > alone.usage.prompt_tokens


def test_tools_that_need_not_be_called_leave_the_text_as_it_is(sdk_with_tools: openai.OpenAI) -> None:
    answer = sdk_with_tools.chat.completions.create(
        model="m", messages=ASKED, tools=[LOOK], max_tokens=8, temperature=0, logprobs=True
    )
    assert answer.choices[0].message.tool_calls is None and answer.choices[0].message.content
    assert answer.choices[0].logprobs and len(answer.choices[0].logprobs.content or []) == 8


def test_a_form_and_tools_together_give_the_one_or_the_other(sdk_with_tools: openai.OpenAI) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"enum": ["red", "green"]}}}
    kinds = set()
    for seed in range(5):
        answer = sdk_with_tools.chat.completions.create(
            model="m",
            messages=ASKED,
            tools=[GO],
            parallel_tool_calls=False,
            response_format=form,
            max_tokens=100,
            seed=seed,
        )
        choice = answer.choices[0]
        kinds.add(choice.finish_reason)
        if choice.finish_reason == "stop":
            assert json.loads(choice.message.content or "") in {"red", "green"}
    assert kinds == {"stop", "tool_calls"}


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        (
            {
                "tools": [
                    {
                        "type": "function",
                        "function": GO["function"] | {"parameters": {"not": {}}, "strict": True},
                    }
                ]
            },
            "tools.0.function.parameters",
        ),
        ({"tool_choice": {"type": "function", "function": {"name": "fly"}}}, "tool_choice.function.name"),
    ],
)
def test_tools_that_cannot_be_held_to_are_refused(
    served: Served, sdk_with_tools: openai.OpenAI, changes: dict[str, Any], param: str
) -> None:
    body = {"messages": ASKED, "tools": [GO], "tool_choice": "required"} | changes
    response = served.post(CHAT, WITH_TOOLS, **body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_tools_on_a_base_without_a_place_for_them_are_refused(served: Served) -> None:
    response = served.post(CHAT, messages=ASKED, tools=[GO])
    assert (response.status_code, response.json()["error"]["param"]) == (400, "tools")
