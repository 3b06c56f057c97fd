import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.data.formats.base import Row, Turn
from luthier.data.formats.chat import FORMAT
from tests.rows import explain_line, read_line

USER = {"role": "user", "content": "q"}
ASSISTANT = {"role": "assistant", "content": "a"}


def read(row):
    return read_line(FORMAT, json.dumps(row).encode())


def explain(row):
    return explain_line(FORMAT, json.dumps(row).encode(), 7)


def test_turns_keep_role_text_name_and_whether_they_are_trained():
    system = {"role": "developer", "content": [{"type": "text", "text": "x"}, {"type": "text", "text": "y"}]}
    context_only = {**ASSISTANT, "weight": 0}
    named = {**USER, "name": "bob"}
    trained = {**ASSISTANT, "weight": 1}
    assert read({"messages": [system, context_only, named, trained]}) == Row(
        [
            Turn("developer", "xy", None, False),
            Turn("assistant", "a", None, False),
            Turn("user", "q", "bob", False),
            Turn("assistant", "a", None, True),
        ]
    )


def test_a_text_that_spells_a_key_is_no_duplicate_key():
    words = ["role", "content", "weight", "name", "messages", '"role"']
    rows = [{"messages": [{"role": "user", "content": word}, ASSISTANT]} for word in words]
    assert all(read(row) is not None for row in rows)


def message_row(**fields):
    return {"messages": [USER, {**ASSISTANT, **fields}]}


@pytest.mark.parametrize(
    ("row", "field", "rule"),
    [
        ({}, "messages", "messages.type"),
        ({"messages": []}, "messages", "messages.type"),
        ({"messages": {}}, "messages", "messages.type"),
        ({"messages": [USER, ASSISTANT], "extra": 1}, "extra", "row.unknown_key"),
        ({"messages": ["hi"]}, "messages[0]", "message.type"),
        ({"messages": [USER]}, "messages[0].role", "messages.no_assistant"),
        ({"messages": [ASSISTANT, USER]}, "messages[1].role", "messages.last"),
        ({"messages": [{"content": "x"}, ASSISTANT]}, "messages[0].role", "message.role"),
        ({"messages": [{**USER, "weight": 1}, ASSISTANT]}, "messages[0].weight", "message.weight"),
        (
            {"messages": [{"role": "system", "content": "x", "weight": 0}, ASSISTANT]},
            "messages[0].weight",
            "message.weight",
        ),
    ],
)
def test_a_broken_rule_is_reported_with_its_line_field_and_rule(row, field, rule):
    assert read(row) is None
    faults = explain(row)
    assert [(fault.line, fault.field, fault.rule) for fault in faults] == [(7, field, rule)]


IMAGE = [{"type": "image_url", "image_url": {}}]


@pytest.mark.parametrize(
    ("fields", "field", "rule"),
    [
        ({"role": "bot"}, "role", "message.role"),
        ({"role": "tool"}, "tool_call_id", "message.tool_call_id"),
        ({"role": ["assistant"]}, "role", "message.role"),
        ({"tool_calls": []}, "tool_calls", "tool_calls.type"),
        ({"audio": {"id": "x"}}, "audio", "message.unsupported"),
        ({"refusal": "no"}, "refusal", "message.unsupported"),
        ({"reasoning_content": 1}, "reasoning_content", "message.reasoning_content"),
        ({"wait": 1}, "wait", "message.unknown_key"),
        ({"content": None}, "content", "message.content"),
        ({"content": []}, "content", "message.content"),
        ({"content": ["x"]}, "content[0]", "content.part"),
        ({"content": IMAGE}, "content[0].type", "content.unsupported"),
        ({"name": 1}, "name", "message.name"),
        *[({"weight": weight}, "weight", "message.weight") for weight in (True, 0.5, 1.0, 2, None)],
    ],
)
def test_a_broken_rule_of_a_message_is_reported_with_its_field_and_rule(fields, field, rule):
    assert read(message_row(**fields)) is None
    [fault] = explain(message_row(**fields))
    assert (fault.line, fault.field, fault.rule) == (7, f"messages[1].{field}", rule)


@pytest.mark.parametrize(
    ("role", "what"),
    [("bot", "'bot' is unknown"), (["assistant"], "is no text"), ("a\nb", r"'a\nb' is unknown")],
)
def test_an_unknown_role_is_quoted(role, what):
    (fault,) = explain(message_row(role=role))
    assert fault.message.startswith(f'"role" {what}; it is one of system, developer, user, assistant, tool')


def test_all_faults_of_a_line_are_reported_at_once():
    row = {"messages": [{"role": "user", "content": 1}, {"role": "assistant", "content": "a", "weight": 3}]}
    assert [fault.field for fault in explain(row)] == ["messages[0].content", "messages[1].weight"]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "weight", "name", "type", "text", "x"]), inner, max_size=4
        )
    ),
    max_leaves=8,
)
MESSAGES = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["user", "assistant", "tool"]) | VALUES,
        "content": st.text(max_size=5) | VALUES,
    },
    optional={"weight": st.sampled_from([0, 1, 0.5, True]), "name": VALUES},
)


@given(st.fixed_dictionaries({"messages": st.lists(MESSAGES, max_size=4) | VALUES}) | VALUES)
def test_a_row_that_is_accepted_by_its_types_breaks_no_rule(row):
    line = json.dumps(row).encode()
    is_of_texts = "tool" not in str(row)
    assert not FORMAT.accepts_by_type(line) or not explain_line(FORMAT, line, 1)
    assert FORMAT.accepts_by_type(line) or explain_line(FORMAT, line, 1) or not is_of_texts
