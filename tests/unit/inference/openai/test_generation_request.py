"""From a checked request to a prompt and its options, with a template and a tokenizer of one line each."""

import json
from types import SimpleNamespace
from typing import Any

import pytest

from luthier.core.errors import ContextLengthExceededError, InvalidValueError
from luthier.data.formats.chat import ChatFormat
from luthier.data.rendering.chat_template import ChatTemplate
from luthier.data.rendering.token_bounds import TokenBounds
from luthier.inference.openai.chat_request import ChatRequest, CompletionRequest, parse_chat, parse_completion
from luthier.inference.openai.generation_request import plan_chat, plan_completion
from luthier.inference.openai.grammar import Grammars
from tests.rows import read_line

TEMPLATE = ChatTemplate(
    "{% for m in messages %}{{ m.role }}{% if 'name' in m %}({{ m.name }}){% endif %}"
    ":{{ m.content }};{% endfor %}"
)


HI = [{"role": "user", "content": "Hi"}]
_TOOL = {"type": "function", "function": {"name": "go"}}
_CALL = {"id": "call_1", "type": "function", "function": {"name": "go", "arguments": "{}"}}


def make_ready(*, context_length: int = 100, num_virtual_tokens: int = 0) -> Any:
    """Return a model of which a token is a character."""
    tokenizer = SimpleNamespace(
        encode=lambda text: [ord(letter) for letter in text],
        encode_raw=lambda text: [ord(letter) for letter in text],
        vocab_size=128,
    )
    facts = SimpleNamespace(context_length=context_length)
    base = SimpleNamespace(tokenizer=tokenizer, template=TEMPLATE, facts=facts, token_bounds=None)
    return SimpleNamespace(base=base, num_virtual_tokens=num_virtual_tokens)


def chat(messages: list[dict[str, str]] = HI, **fields: Any) -> ChatRequest:
    return parse_chat(json.dumps({"model": "m", "messages": messages} | fields).encode())


def completion(prompt: str | list[str], **fields: Any) -> CompletionRequest:
    return parse_completion(json.dumps({"model": "m", "prompt": prompt} | fields).encode())


def plan(request: ChatRequest, ready: Any = None, *, default: int = 10, max_cache: int = 1000) -> Any:
    limits: dict[str, Any] = {"max_tokens_default": default, "max_cache_tokens": max_cache}
    return plan_chat(request, ready or make_ready(), **limits, grammars=Grammars())


@pytest.mark.parametrize("names", [{}, {"name": "Ann"}, {"name": ""}])
def test_messages_are_rendered_as_training_renders_them(names):
    messages = [{"role": "user", "content": "Hi"} | names, {"role": "assistant", "content": "Yes"}]
    row = read_line(ChatFormat(), json.dumps({"messages": messages}).encode())
    trained = TEMPLATE.render([turn.to_message() for turn in row.turns], add_generation_prompt=True)
    [prompt] = plan(chat(messages)).prompts
    assert "".join(map(chr, prompt)) == trained


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [_TOOL]}, "tools"),
        ({"messages": [{"role": "assistant", "tool_calls": [_CALL]}]}, "messages.0.tool_calls"),
    ],
)
def test_what_the_template_has_no_place_for_is_refused(fields, param):
    with pytest.raises(InvalidValueError, match="has no place for tool") as caught:
        plan(chat(**fields))
    assert caught.value.param == param


def test_a_request_that_the_server_could_never_hold_is_refused_with_numbers():
    with pytest.raises(ContextLengthExceededError, match="memory for one answer is 20 tokens") as caught:
        plan(chat(max_tokens=13), max_cache=20)
    assert (caught.value.http_status, caught.value.param) == (400, "messages")
    asked = completion(["a", "abcdef"], max_tokens=15)
    with pytest.raises(ContextLengthExceededError, match="has 6 and the answer was given 15") as caught:
        plan_completion(asked, make_ready(), max_cache_tokens=20)
    assert caught.value.param == "prompt"
    assert "lower max_tokens" in caught.value.message
    assert plan_completion(asked, make_ready(), max_cache_tokens=21).options.max_tokens == 15


def test_an_answer_of_unnamed_length_takes_no_more_than_the_server_can_hold():
    planned = plan(chat(), default=50, max_cache=20)
    assert len(planned.prompts[0]) + planned.options.max_tokens == 20


def test_virtual_tokens_are_taken_from_the_context_and_from_the_servers_memory():
    ready = make_ready(context_length=30, num_virtual_tokens=6)
    planned = plan(chat(), ready, default=50)
    assert len(planned.prompts[0]) + planned.options.max_tokens == 24
    with pytest.raises(ContextLengthExceededError, match=r"context is 24 tokens beside the model's own 6"):
        plan(chat(max_tokens=17), ready)
    asked = completion(["abcdef"], max_tokens=15)
    with pytest.raises(ContextLengthExceededError, match=r"one answer is 20 tokens beside the model's own 6"):
        plan_completion(asked, ready, max_cache_tokens=26)
    assert plan_completion(asked, ready, max_cache_tokens=27).options.max_tokens == 15


def test_every_answer_to_a_prompt_has_a_seed_of_its_own_whatever_the_other_prompts():
    def seeds(prompts: list[str], n: int) -> list[int | None]:
        planned = plan_completion(completion(prompts, n=n, seed=-7), make_ready(), max_cache_tokens=99)
        return [planned.options_of(index).seed for index in range(planned.num_choices)]

    three = seeds(["a"], 3)
    assert three[0] == -7 and len(set(three)) == 3
    assert seeds(["b", "a"], 3) == three * 2
    assert seeds(["a"], 2) == three[:2]


def test_a_bias_of_a_token_that_the_base_does_not_have_is_refused():
    with pytest.raises(InvalidValueError) as caught:
        plan_completion(completion("a", logit_bias={"128": 1}), make_ready(), max_cache_tokens=100)
    assert caught.value.param == "logit_bias.128"


def test_a_prompt_that_is_far_too_long_is_refused_before_it_is_tokenised():
    ready = make_ready()
    ready.base.token_bounds = TokenBounds(4)
    ready.base.tokenizer.encode = ready.base.tokenizer.encode_raw = None
    with pytest.raises(ContextLengthExceededError, match=r"has at least 102\. Shorten") as caught:
        plan(chat([{"role": "user", "content": "z" * 400}]), ready)
    assert caught.value.param == "messages"
    with pytest.raises(ContextLengthExceededError) as caught:
        plan_completion(completion(["z" * 400]), ready, max_cache_tokens=999)
    assert caught.value.param == "prompt"
