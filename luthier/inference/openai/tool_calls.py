"""How a base writes calls of tools, found by looking at what its own chat template makes of one.

Hermes and Qwen write JSON between marks, Llama bare JSON, Mistral a JSON list after a mark; whatever else is
a JSON object with a name and arguments between two texts is found the same way. Templates that write
anything but JSON have no syntax here: their calls stay text.
"""

import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from luthier.core.errors import InvalidValueError
from luthier.data.rendering.chat_template import ChatTemplate
from luthier.data.rendering.tokenizer import Tokenizer

_NAME = "probe_of_tools"
_ARGUMENTS = {"probe_key": 7}
_TOOL = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "A probe.",
        "parameters": {"type": "object", "properties": {"probe_key": {"type": "integer"}}},
    },
}
# Ids as OpenAI has them, and of the one length that Mistral's templates take.
_LONG_ID, _SHORT_ID = "call_000000000000000000000001", "abcdefgh1"
_ASKED = [{"role": "user", "content": "x"}]
# The syntax of Hermes' models; some of their templates only describe it in words.
# Some templates write an empty thought before the last answer.
_THOUGHT = re.compile(r".*</think>\s*", re.DOTALL)
_HERMES = ("<tool_call>\n", "\n</tool_call>")


@dataclass(frozen=True)
class CallSyntax:
    """How calls are written: `begin`, then a call or a list of them, then `end`.

    A call is `head`, the name, `middle`, the arguments, `}`. `between` parts two calls, None where an answer
    has one at most. `shown_token_ids` are marks among these texts that readers of an answer do not see
    otherwise. `has_short_ids` says that the template takes ids of nine letters and digits only.
    """

    begin: str
    end: str
    head: str = '{"name": "'
    middle: str = '", "arguments": '
    is_list: bool = False
    between: str | None = None
    name_key: str = "name"
    arguments_key: str = "arguments"
    shown_token_ids: frozenset[int] = frozenset()
    has_short_ids: bool = False


def render_calls(
    template: ChatTemplate,
    messages: Sequence[dict[str, Any]],
    tools: Sequence[dict[str, Any]],
    *,
    add_generation_prompt: bool,
) -> str:
    """Render messages, those with calls instead of text included.

    Args:
        add_generation_prompt: whether to open an assistant's turn at the end.

    Raises:
        InvalidValueError: when the template refuses the messages.
    """
    try:
        return template.render(messages, add_generation_prompt=add_generation_prompt, tools=tools)
    except InvalidValueError:
        if all(message["content"] is not None for message in messages):
            raise
    # Some templates look into every content, and fail on none.
    texts = [message | {"content": message["content"] or ""} for message in messages]
    return template.render(texts, add_generation_prompt=add_generation_prompt, tools=tools)


@functools.lru_cache(maxsize=64)
def find_syntax(template: ChatTemplate, tokenizer: Tokenizer) -> CallSyntax | None:
    """Find out how a base writes calls.

    Returns:
        The syntax; None where the template writes no calls, or not as JSON.
    """
    for call_id in (_LONG_ID, _SHORT_ID):
        one = _answer(template, tokenizer, [call_id])
        if one is not None:
            break
    else:
        return _find_described(template, tokenizer)
    found = _find_json(one)
    if found is None:
        return None
    start, stop, call, is_list = found
    raw = one[start:stop]
    name_key = next((key for key, value in call.items() if value == _NAME), None)
    arguments_key = next((key for key, value in call.items() if value == _ARGUMENTS), None)
    if name_key is None or arguments_key is None:
        return None
    name_at = raw.index(_NAME)
    arguments_at = raw.find("{", name_at)
    if arguments_at < 0:
        return None
    syntax = CallSyntax(
        begin=_THOUGHT.sub("", one[:start]),
        end=one[stop:],
        head=raw[raw.index("{") : name_at],
        middle=raw[name_at + len(_NAME) : arguments_at],
        is_list=is_list,
        between=", " if is_list else None,
        name_key=name_key,
        arguments_key=arguments_key,
        has_short_ids=call_id == _SHORT_ID,
    )
    two = _answer(template, tokenizer, [call_id, call_id[:-1] + "2"])
    return _with_marks(_with_between(syntax, two), tokenizer)


def _answer(template: ChatTemplate, tokenizer: Tokenizer, call_ids: Sequence[str]) -> str | None:
    """Return how an answer with calls is written, its end of turn cut off; None where the template can't."""
    calls = [
        {"id": call_id, "type": "function", "function": {"name": _NAME, "arguments": _ARGUMENTS}}
        for call_id in call_ids
    ]
    answering = {"role": "assistant", "content": None, "tool_calls": calls}
    try:
        asked = template.render(_ASKED, add_generation_prompt=True, tools=[_TOOL])
        answered = render_calls(template, [*_ASKED, answering], [_TOOL], add_generation_prompt=False)
    except InvalidValueError:
        return None
    if not answered.startswith(asked) or _NAME not in answered[len(asked) :]:
        return None
    ids = tokenizer.encode(answered[len(asked) :])
    end = next((i for i, token_id in enumerate(ids) if token_id in tokenizer.stop_token_ids), len(ids))
    return tokenizer.decode(ids[:end], skip_special=False)


def _find_json(text: str) -> tuple[int, int, dict[str, Any], bool] | None:
    """Return the place of the first JSON with a call, the call, and whether it is in a list."""
    decoder = json.JSONDecoder()
    for start, letter in enumerate(text):
        if letter not in "[{":
            continue
        try:
            value, stop = decoder.raw_decode(text, start)
        except ValueError:
            continue
        is_list = isinstance(value, list)
        call = value[0] if is_list and value else value
        if isinstance(call, dict) and _NAME in text[start:stop]:
            return start, stop, call, is_list
    return None


def _with_between(syntax: CallSyntax, two: str | None) -> CallSyntax:
    if two is None or syntax.is_list:
        return syntax
    first, last = two.find(_NAME), two.rfind(_NAME)
    if first == last:
        return syntax
    _, stop = json.JSONDecoder().raw_decode(two, two.rindex(syntax.head, 0, first + 1))
    between = two[stop : two.rindex(syntax.head, 0, last + 1)]
    return replace(syntax, between=between)


def _find_described(template: ChatTemplate, tokenizer: Tokenizer) -> CallSyntax | None:
    """Return Hermes' syntax where the template names it in its description of tools."""
    try:
        asked = template.render(_ASKED, add_generation_prompt=True, tools=[_TOOL])
    except InvalidValueError:
        return None
    begin, end = _HERMES
    if begin.strip() not in asked:
        return None
    return _with_marks(CallSyntax(begin, end, between=f"{end}\n{begin}"), tokenizer)


def _with_marks(syntax: CallSyntax, tokenizer: Tokenizer) -> CallSyntax:
    ids = tokenizer.encode(syntax.begin + syntax.end + (syntax.between or ""))
    shown = frozenset(token_id for token_id in ids if tokenizer.is_special(token_id))
    return replace(syntax, shown_token_ids=shown)
