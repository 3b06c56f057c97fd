"""Rendering and token ids are those of transformers, on the tiny base and on every fetched one.

Of messages that spell a special token the ids differ on purpose: transformers takes them for the token.
"""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from luthier.core.errors import InvalidValueError
from luthier.core.settings import Settings
from luthier.data.formats import discover
from luthier.data.rendering.chat_template import ChatTemplate
from luthier.data.rendering.loss_mask import render_row
from luthier.data.rendering.tokenizer import Tokenizer
from tests.rows import read_line
from tests.tiny import build_tiny_base

SYSTEM = {"role": "system", "content": "You are terse."}
USER = {"role": "user", "content": "Give me 3 names,\n\n  12 towns  and 7 <|im_x|> marks: né 🎉 日本\t{}"}
ASSISTANT = {"role": "assistant", "content": '{"names": ["Zoë", "Ås"],\n    "n": 12}'}
CONVERSATIONS = [[USER], [SYSTEM, USER], [USER, ASSISTANT], [SYSTEM, USER, ASSISTANT, USER, ASSISTANT]]


def _fetched_bases() -> list[Path]:
    return sorted(path.parent for path in Settings().bases_dir.glob("*/manifest.json"))


@pytest.fixture(scope="module", params=["tiny", *_fetched_bases()], ids=lambda value: Path(value).name)
def base(request, tmp_path_factory):
    if request.param == "tiny":
        return build_tiny_base(tmp_path_factory.mktemp("bases") / "tiny")
    return request.param


@pytest.fixture(scope="module")
def theirs(base):
    return AutoTokenizer.from_pretrained(base, local_files_only=True, trust_remote_code=False)


@pytest.mark.parametrize("add_generation_prompt", [False, True])
@pytest.mark.parametrize("messages", CONVERSATIONS, ids=len)
def test_chats_render_and_tokenise_as_transformers_does(base, theirs, messages, add_generation_prompt):
    text = ChatTemplate.load(base).render(messages, add_generation_prompt=add_generation_prompt)
    arguments = {"add_generation_prompt": add_generation_prompt}
    assert text == theirs.apply_chat_template(messages, tokenize=False, **arguments)
    expected = theirs.apply_chat_template(messages, tokenize=True, return_dict=False, **arguments)
    assert Tokenizer.load(base).encode(text) == expected


# In the manner of the tool templates of widely used bases: definitions as JSON, calls as JSON with their
# arguments as an object or a text, answers in a turn of their own, thoughts before the answer.
TOOL_TEMPLATE = """{%- if tools %}
{{- '<|im_start|>system\\n' }}
{%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
{{- '<tools>' }}
{%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}
{{- '\\n</tools><|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>' + message.content + '</tool_response><|im_end|>\\n' }}
{%- elif message.role != 'system' or not tools %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.reasoning_content %}{{- '<think>' + message.reasoning_content + '</think>' }}{%- endif %}
{%- if message.content %}{{- message.content }}{%- endif %}
{%- for call in message.tool_calls or [] %}
{{- '<tool_call>{"name": "' + call.function.name + '", "arguments": ' }}
{%- if call.function.arguments is string %}{{- call.function.arguments }}
{%- else %}{{- call.function.arguments | tojson }}{%- endif %}
{{- '}</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Tells the weather <now>.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
            },
        },
    }
]
CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city": "Ås", "days": [1, 2.5, null]}'},
}
TOOL_ROW = {
    "messages": [
        SYSTEM,
        USER,
        {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "Look."},
        {"role": "tool", "tool_call_id": "call_1", "content": "4 °C"},
        ASSISTANT,
    ],
    "tools": TOOLS,
}


def as_transformers_documents(messages):
    """Return messages with the arguments of calls as objects, which is how its templates are called."""
    messages = json.loads(json.dumps(messages))
    for message in messages:
        for call in message.get("tool_calls") or []:
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    return messages


@pytest.mark.parametrize("with_tools", [True, False])
@pytest.mark.parametrize("num_messages", [3, 4, 5])
def test_tools_and_calls_render_as_transformers_renders_them(tmp_path, with_tools, num_messages):
    base = build_tiny_base(tmp_path / "base")
    (base / "chat_template.jinja").write_text(TOOL_TEMPLATE)
    row = {"messages": TOOL_ROW["messages"][:num_messages]} | ({"tools": TOOLS} if with_tools else {})
    if num_messages == 4:
        # A row ends with the assistant's turn.
        row["messages"] = [*row["messages"], {"role": "assistant", "content": ""}]
    read = read_line(discover()["chat"], json.dumps(row).encode())
    theirs = AutoTokenizer.from_pretrained(base, local_files_only=True, trust_remote_code=False)
    expected = theirs.apply_chat_template(
        as_transformers_documents(row["messages"]), tools=row.get("tools"), tokenize=False
    )
    rendered = render_row(ChatTemplate.load(base), read)
    assert rendered.text == expected
    assert Tokenizer.load(base).encode(rendered.text) == theirs.apply_chat_template(
        as_transformers_documents(row["messages"]), tools=row.get("tools"), return_dict=False
    )
    # The whole call is learnt, from after the header to the end of the turn.
    called = expected[rendered.spans[0].start : rendered.spans[0].end]
    assert called.startswith('<think>Look.</think><tool_call>{"name": "weather"')
    assert called.endswith("}</tool_call><|im_end|>\n")
    assert "4 °C" not in "".join(expected[span.start : span.end] for span in rendered.spans)


def test_a_template_without_a_place_for_tools_refuses_them(tmp_path):
    template = ChatTemplate.load(build_tiny_base(tmp_path / "base"))
    read = read_line(discover()["chat"], json.dumps(TOOL_ROW).encode())
    with pytest.raises(InvalidValueError, match="no place for tools"):
        render_row(template, read)
    without = {"messages": TOOL_ROW["messages"]}
    read = read_line(discover()["chat"], json.dumps(without).encode())
    with pytest.raises(InvalidValueError, match="no place for tool_calls") as caught:
        render_row(template, read)
    assert caught.value.param == "messages[2].tool_calls"


@pytest.mark.parametrize("skip_special", [False, True])
def test_answers_decode_as_transformers_does(base, theirs, skip_special):
    tokenizer = Tokenizer.load(base)
    ids = tokenizer.encode("".join(message["content"] for message in (SYSTEM, USER, ASSISTANT)))
    assert tokenizer.decode(ids, skip_special=skip_special) == theirs.decode(
        ids, skip_special_tokens=skip_special, clean_up_tokenization_spaces=False
    )


def test_the_turn_ends_with_what_transformers_calls_the_end(base, theirs):
    assert theirs.eos_token_id in Tokenizer.load(base).stop_token_ids
