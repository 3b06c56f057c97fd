"""Tools in chat rows: every rule that concerns them, and what becomes of a row that keeps them."""

import json

import pytest

from luthier.data.formats.base import ToolCall, Turn
from luthier.data.formats.chat import FORMAT
from tests.rows import explain_line, read_line

USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}


def call(id_="c1", name="look_up", arguments='{"city": "Oslo"}', **extra):
    return {"id": id_, "type": "function", "function": {"name": name, "arguments": arguments}, **extra}


def calling(*calls, **fields):
    return {"role": "assistant", "content": None, "tool_calls": list(calls) or [call()], **fields}


def answered(id_="c1", content="4 degrees"):
    return {"role": "tool", "tool_call_id": id_, "content": content}


def tool(name="look_up", **fields):
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object"}, **fields}}


A, B, FUNCTION = call("a"), call("b"), {"name": "f", "arguments": "{}"}


def read(row):
    return read_line(FORMAT, json.dumps(row).encode())


def faults(row):
    line = json.dumps(row).encode()
    assert read_line(FORMAT, line) is None
    return [(fault.field, fault.rule) for fault in explain_line(FORMAT, line, 3)]


def test_a_call_its_answer_and_the_tools_come_through():
    thinking = calling(reasoning_content="I need the weather.")
    row = read(
        {"messages": [USER, thinking, answered(), ANSWER], "tools": [tool()], "parallel_tool_calls": False}
    )
    assert row.tools == [tool()]
    assert row.turns == [
        Turn("user", "q", None, False),
        Turn(
            "assistant",
            None,
            None,
            True,
            tool_calls=(ToolCall("c1", "look_up", {"city": "Oslo"}),),
            reasoning="I need the weather.",
        ),
        Turn("tool", "4 degrees", None, False, tool_call_id="c1"),
        Turn("assistant", "a", None, True),
    ]


def test_the_older_functions_become_tools_and_their_answers_a_tools():
    called = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}
    answered = {"role": "function", "name": "f", "content": "1"}
    row = read({"messages": [USER, called, answered, ANSWER], "functions": [{"name": "f"}]})
    assert row.tools == [{"type": "function", "function": {"name": "f"}}]
    assert row.turns[1].tool_calls == (ToolCall("call_1", "f", {}),)
    assert (row.turns[2].role, row.turns[2].tool_call_id) == ("tool", "call_1")


@pytest.mark.parametrize(
    "messages",
    [
        [USER, calling()],
        [USER, calling(content="let me see")],
        [USER, {key: value for key, value in calling().items() if key != "content"}],
        [USER, calling(call("c1"), call("c2")), answered("c2"), answered("c1"), ANSWER],
        [USER, calling(weight=0), answered(), {**ANSWER, "weight": 1}],
        [USER, calling(), answered(content=[{"type": "text", "text": "4"}]), ANSWER],
        # The shape in which SDKs write an answer out.
        [USER, {**ANSWER, "refusal": None, "audio": None, "function_call": None, "tool_calls": None}],
    ],
    ids=range(7),
)
def test_sound_conversations_are_read(messages):
    assert read({"messages": messages, "tools": None}) is not None


@pytest.mark.parametrize(
    ("messages", "field", "rule"),
    [
        ([USER, {**ANSWER, "content": None}], "[1].content", "message.content"),
        ([{**USER, "content": None}, ANSWER], "[0].content", "message.content"),
        ([USER, calling(), ANSWER], "[1].tool_calls[0].id", "tool_call.unanswered"),
        ([USER, calling(A, B), answered("b"), ANSWER], "[1].tool_calls[0].id", "tool_call.unanswered"),
        ([USER, calling(A, A)], "[1].tool_calls[1].id", "tool_call.id_twice"),
        ([USER, answered(), ANSWER], "[1].tool_call_id", "tool.no_call"),
        ([USER, calling(), answered("c9"), answered(), ANSWER], "[2].tool_call_id", "tool.no_call"),
        ([USER, calling(), answered(), answered(), ANSWER], "[3].tool_call_id", "tool.no_call"),
        ([USER, calling(), answered()], "[2].role", "messages.last"),
        ([{**USER, "tool_calls": [A]}, ANSWER], "[0].tool_calls", "message.misplaced"),
        ([{**USER, "reasoning_content": "x"}, ANSWER], "[0].reasoning_content", "message.misplaced"),
        ([{**USER, "tool_call_id": "x"}, ANSWER], "[0].tool_call_id", "message.misplaced"),
        ([USER, calling(), {"role": "function", "content": "1"}, ANSWER], "[2].name", "message.name"),
        ([USER, calling(function_call=FUNCTION)], "[1].function_call", "tool_calls.twice"),
    ],
)
def test_a_rule_between_messages_is_reported_at_its_message(messages, field, rule):
    assert faults({"messages": messages}) == [(f"messages{field}", rule)]


@pytest.mark.parametrize(
    ("broken", "field", "rule"),
    [
        (call(arguments={"city": "Oslo"}), "function.arguments", "tool_call.arguments"),
        (call(arguments="city"), "function.arguments", "tool_call.arguments"),
        (call(arguments="[1]"), "function.arguments", "tool_call.arguments"),
        (call(arguments=""), "function.arguments", "tool_call.arguments"),
        (call(arguments='{"a": NaN}'), "function.arguments", "tool_call.arguments"),
        (call(name="look up"), "function.name", "tool.name"),
        (call(name="a" * 65), "function.name", "tool.name"),
        (call(name=""), "function.name", "tool.name"),
        (call(name=None), "function.name", "tool.name"),
        (call(id_=""), "id", "tool_call.id"),
        (call(id_=None), "id", "tool_call.id"),
        (call(index=0), "index", "tool_call.unknown_key"),
        ({**call(), "type": "custom"}, "type", "tool_call.type"),
        ({**call(), "function": "f"}, "function", "tool_call.function"),
    ],
)
def test_a_rule_of_a_call_is_reported_at_its_field(broken, field, rule):
    assert faults({"messages": [USER, calling(broken)]}) == [(f"messages[1].tool_calls[0].{field}", rule)]


@pytest.mark.parametrize(
    ("fields", "field", "rule"),
    [
        ({"tools": {}}, "tools", "tools.type"),
        ({"tools": [tool()] * 129}, "tools", "tools.type"),
        ({"tools": [tool(), tool()]}, "tools[1].function.name", "tool.name_twice"),
        ({"tools": [{"name": "f"}]}, "tools[0]", "tool.type"),
        ({"tools": [tool(parameters=[])]}, "tools[0].function.parameters", "tool.parameters"),
        ({"tools": [tool(description=1)]}, "tools[0].function.description", "tool.description"),
        ({"tools": [tool(strict=1)]}, "tools[0].function.strict", "tool.strict"),
        ({"tools": [tool(colour=1)]}, "tools[0].function.colour", "tool.unknown_key"),
        ({"tools": [tool(name="a b")]}, "tools[0].function.name", "tool.name"),
        ({"functions": [{"name": "a.b"}]}, "functions[0].name", "tool.name"),
        ({"functions": [{"name": "f"}], "tools": [tool()]}, "functions", "tools.twice"),
        ({"parallel_tool_calls": 1}, "parallel_tool_calls", "row.parallel_tool_calls"),
    ],
)
def test_a_rule_of_the_row_is_reported_at_its_field(fields, field, rule):
    found = faults({"messages": [USER, ANSWER], **fields})
    assert set(found) == {(field, rule)} or (len(found) > 1 and found[0] == (field, rule))


def test_two_calls_at_once_contradict_parallel_tool_calls_false():
    row = {"messages": [USER, calling(call("a"), call("b"))], "parallel_tool_calls": False}
    assert faults(row) == [("messages[1].tool_calls", "tool_calls.parallel")]


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file"])
def test_what_is_no_text_is_refused_by_name_with_its_field(kind):
    parts = [{"type": "text", "text": "see"}, {"type": kind, kind: {"url": "data:image/png;base64,AAAA"}}]
    line = json.dumps({"messages": [{"role": "user", "content": parts}, ANSWER]}).encode()
    [fault] = explain_line(FORMAT, line, 5)
    assert (fault.line, fault.field) == (5, "messages[0].content[1].type")
    assert f'not supported ("{kind}")' in str(fault)
    assert not FORMAT.accepts_by_type(line)
