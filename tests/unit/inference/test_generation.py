"""From a checked request to a prompt and its options, with a template and a tokenizer of one line each."""

import json
from types import SimpleNamespace
from typing import Any

import pytest

from luthier.data.formats.chat import ChatFormat
from luthier.data.render import ChatTemplate
from luthier.inference.generation import plan_chat
from luthier.inference.protocol import ChatRequest, parse_chat

TEMPLATE = ChatTemplate(
    "{% for m in messages %}{{ m.role }}{% if 'name' in m %}({{ m.name }}){% endif %}"
    ":{{ m.content }};{% endfor %}"
)


def make_served(*, context_length: int = 100) -> Any:
    """Return a model of which a token is a character."""
    tokenizer = SimpleNamespace(
        encode=lambda text: [ord(letter) for letter in text],
        vocab_size=128,
    )
    facts = SimpleNamespace(context_length=context_length)
    return SimpleNamespace(base=SimpleNamespace(tokenizer=tokenizer, template=TEMPLATE, facts=facts))


def chat(messages: list[dict[str, str]], **fields: Any) -> ChatRequest:
    return parse_chat(json.dumps({"model": "m", "messages": messages} | fields).encode())


@pytest.mark.parametrize("names", [{}, {"name": "Ann"}, {"name": ""}])
def test_messages_are_rendered_as_training_renders_them(names: dict[str, str]) -> None:
    messages = [{"role": "user", "content": "Hi"} | names, {"role": "assistant", "content": "Yes"}]
    turns = ChatFormat().read(json.dumps({"messages": messages}).encode())
    assert turns is not None
    trained = TEMPLATE.render([turn.to_message() for turn in turns], add_generation_prompt=True)
    [prompt], _ = plan_chat(chat(messages), make_served(), max_tokens_default=10)
    assert "".join(map(chr, prompt)) == trained
