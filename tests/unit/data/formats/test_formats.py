"""The formats beside chat: what a row of each becomes, and which rule a broken one breaks."""

import json

import pytest

from luthier.data.formats import discover
from luthier.data.formats.base import Fault, Row, ToolCall, Turn
from luthier.data.readers.detect_format import detect_format, find_format
from tests.rows import explain_line, read_line


def read(name, row):
    line = json.dumps(row).encode()
    return read_line(discover()[name], line)


def faults(name, row):
    assert read(name, row) is None
    return [
        (fault.field, fault.rule) for fault in explain_line(discover()[name], json.dumps(row).encode(), 2)
    ]


def asked(question, answer, *, is_plain=False):
    turns = [Turn("user", question, None, False), Turn("assistant", answer, None, True)]
    return Row(turns, is_plain=is_plain)


@pytest.mark.parametrize(
    ("name", "row", "expected"),
    [
        ("completion", {"prompt": "p", "completion": " c"}, asked("p", " c", is_plain=True)),
        ("completion", {"prompt": "", "completion": "c"}, asked("", "c", is_plain=True)),
        ("instruction", {"instruction": "i", "output": "o"}, asked("i", "o")),
        ("instruction", {"instruction": "i", "input": "n", "output": "o"}, asked("i\n\nn", "o")),
        ("instruction", {"instruction": "i", "input": "", "output": "o"}, asked("i", "o")),
        ("instruction", {"instruction": "i", "input": None, "output": "o"}, asked("i", "o")),
        ("labels", {"text": "t", "label": "good"}, asked("t", "good")),
        ("labels", {"text": "t", "label": 3}, asked("t", "3")),
        ("text", {"text": "t"}, Row([Turn("assistant", "t", None, True)], is_plain=True)),
    ],
)
def test_rows_of_texts_become_turns(name, row, expected):
    assert read(name, row) == expected


@pytest.mark.parametrize(
    ("name", "row", "expected"),
    [
        ("completion", {"prompt": "p"}, [("completion", "field.missing")]),
        ("completion", {"prompt": "p", "completion": ""}, [("completion", "field.empty")]),
        ("completion", {"prompt": ["p"], "completion": "c"}, [("prompt", "field.type")]),
        ("instruction", {"instruction": "i", "output": None}, [("output", "field.type")]),
        ("instruction", {"instruction": "i", "output": "o", "id": 1}, [("id", "row.unknown_key")]),
        ("labels", {"text": "t", "label": True}, [("label", "field.type")]),
        ("labels", {"text": "t", "label": 0.5}, [("label", "field.type")]),
        ("text", {"text": ""}, [("text", "field.empty")]),
    ],
)
def test_a_broken_row_of_texts_is_reported_at_its_field(name, row, expected):
    assert faults(name, row) == expected


def test_a_key_that_comes_twice_is_refused():
    for line in (b'{"text": "a", "text": "b"}', b'{"text": "a", "label": "x", "label": "y"}'):
        found = detect_format(line, 1)
        assert isinstance(found, Fault)
        assert found.rule == "json.duplicate_key"


def turn(speaker, value):
    return {"from": speaker, "value": value}


def test_a_sharegpt_conversation_with_tools_becomes_turns():
    function = {"name": "f", "description": "d"}
    row = {
        "id": "x1",
        "system": "be brief",
        "tools": json.dumps([function]),
        "conversations": [
            turn("human", "q"),
            turn("function_call", '{"name": "f", "arguments": {"a": 1}}'),
            turn("observation", "7"),
            turn("gpt", "seven"),
        ],
    }
    found = read("sharegpt", row)
    assert found.tools == [{"type": "function", "function": function}]
    assert found.turns == [
        Turn("system", "be brief", None, False),
        Turn("user", "q", None, False),
        Turn("assistant", None, None, True, tool_calls=(ToolCall("call_1_0", "f", {"a": 1}),)),
        Turn("tool", "7", None, False, tool_call_id="call_1_0"),
        Turn("assistant", "seven", None, True),
    ]


@pytest.mark.parametrize(
    ("conversations", "field", "rule"),
    [
        ([], "", "messages.type"),
        ([turn("human", "q")], "[0].from", "messages.no_assistant"),
        ([turn("gpt", "a"), turn("human", "q")], "[1].from", "messages.last"),
        ([turn("alien", "q"), turn("gpt", "a")], "[0].from", "message.role"),
        ([turn("human", 1), turn("gpt", "a")], "[0].value", "message.content"),
        ([turn("tool", "7"), turn("gpt", "a")], "[0].from", "tool.no_call"),
        ([turn("human", "q"), turn("function_call", "f(1)")], "[1].value", "tool_call.arguments"),
        ([{**turn("gpt", "a"), "weight": 1}], "[0].weight", "message.unknown_key"),
    ],
)
def test_a_broken_sharegpt_row_is_reported_at_its_turn(conversations, field, rule):
    assert faults("sharegpt", {"conversations": conversations}) == [(f"conversations{field}", rule)]


ASKED = {"messages": [{"role": "user", "content": "q"}]}
GOOD = [{"role": "assistant", "content": "good"}]
BAD = [{"role": "assistant", "content": "bad"}]


def preference(given=ASKED, preferred=GOOD, rejected=BAD, **extra):
    return {"input": given, "preferred_output": preferred, "non_preferred_output": rejected, **extra}


def test_a_preference_holds_both_conversations_and_trains_the_outputs_alone():
    before = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        *ASKED["messages"],
    ]
    row = read("preference", preference({"messages": before, "tools": []}))
    assert [(one.content, one.is_trained) for one in row.turns] == [
        ("hi", False),
        ("hello", False),
        ("q", False),
        ("good", True),
    ]
    assert row.rejected[:3] == row.turns[:3]
    assert row.rejected[3] == Turn("assistant", "bad", None, True)


def test_the_older_names_of_the_outputs_are_taken():
    row = {"input": ASKED, "preferred_completion": GOOD, "non_preferred_completion": BAD}
    assert detect_format(json.dumps(row).encode(), 1) is discover()["preference"]
    assert read("preference", row) == read("preference", preference())


def asking(*messages):
    return preference(given={"messages": [*ASKED["messages"], *messages]})


@pytest.mark.parametrize(
    ("row", "field", "rule"),
    [
        (preference(given=[]), "input", "input.type"),
        (preference(given={"messages": []}), "input.messages", "messages.type"),
        (asking(*GOOD), "input.messages[1].role", "messages.last"),
        (preference(given={**ASKED, "n": 1}), "input.n", "input.unknown_key"),
        (preference(preferred="good"), "preferred_output", "output.type"),
        (preference(rejected=[]), "non_preferred_output", "output.type"),
        (preference(rejected=ASKED["messages"]), "non_preferred_output[0].role", "output.role"),
        (
            preference(rejected=[{"role": "assistant"}]),
            "non_preferred_output[0].content",
            "message.content",
        ),
        (preference(rejected=GOOD), "non_preferred_output", "preference.equal"),
        (preference(label=1), "label", "row.unknown_key"),
        (
            asking({"role": "user", "content": [{"type": "image_url"}]}),
            "input.messages[1].content[0].type",
            "content.unsupported",
        ),
        (
            preference(preferred=[{"role": "tool", "tool_call_id": "c", "content": "7"}, *GOOD]),
            "preferred_output[0].tool_call_id",
            "tool.no_call",
        ),
    ],
)
def test_a_broken_preference_is_reported_at_its_field(row, field, rule):
    assert faults("preference", row) == [(field, rule)]


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("chat", ["messages tools"]),
        ("sharegpt", ["conversations"]),
        ("completion", ["prompt completion", "prompt"]),
        ("instruction", ["instruction input output", "instruction"]),
        ("text", ["text"]),
        ("labels", ["text label"]),
        ("preference", ["input preferred_output non_preferred_output", "input preferred_output"]),
    ],
)
def test_a_format_is_known_by_its_keys(name, keys):
    assert {find_format(set(one.split())).name for one in keys} == {name}


def test_keys_of_no_format_are_reported_as_of_a_chat():
    assert find_format({"question", "answer"}) is None
    assert detect_format(b'{"question": 1}', 1) is discover()["chat"]


def test_a_row_of_another_format_is_one_fault_that_names_both():
    [fault] = explain_line(discover()["chat"], b'{"prompt": "p", "completion": "c"}', 9)
    assert (fault.line, fault.rule) == (9, "row.other_format")
    assert "completion" in fault.message
    assert "chat" in fault.message
    # A row that only lacks a key is reported what it lacks.
    [fault] = explain_line(discover()["labels"], b'{"text": "t"}', 9)
    assert (fault.field, fault.rule) == ("label", "field.missing")
