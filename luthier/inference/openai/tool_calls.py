"""Calls of tools: how a base writes them, found by what its chat template makes of one, and their parser.

Hermes and Qwen write JSON between marks, Llama bare JSON, Mistral a JSON list after a mark; whatever else is
a JSON object with a name and arguments between two texts is found the same way. Templates that write
anything but JSON have no syntax here: their calls stay text. Text only: no tokens, no requests.
"""

import functools
import json
import re
import secrets
import string
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from luthier.core.errors import InvalidValueError
from luthier.data.rendering.chat_template import ChatTemplate
from luthier.data.rendering.tokenizer import Tokenizer
from luthier.inference.openai.fields import load

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
        one = _probe(template, tokenizer, [call_id])
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
    two = _probe(template, tokenizer, [call_id, call_id[:-1] + "2"])
    return _with_marks(_with_between(syntax, two), tokenizer)


def _probe(template: ChatTemplate, tokenizer: Tokenizer, call_ids: Sequence[str]) -> str | None:
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


_ID_LETTERS = string.ascii_letters + string.digits
_ID_LENGTH, _SHORT_ID_LENGTH = 24, 9


@dataclass(frozen=True)
class CallBegun:
    """A call whose name is known; `place` counts the answer's calls."""

    place: int
    id: str
    name: str


@dataclass(frozen=True)
class CallArguments:
    """More of the JSON text of a call's arguments."""

    place: int
    text: str


ReadPart = str | CallBegun | CallArguments


class ToolCallParser:
    """Part one answer's text.

    Args:
        names: the tools there are; what calls another one is text.
        is_parallel: whether there may be more than one call; what follows the first is left out else.
    """

    def __init__(self, syntax: CallSyntax, names: frozenset[str], *, is_parallel: bool) -> None:
        self._syntax = syntax
        self._names = names
        self._is_parallel = is_parallel
        self._mark, self._end = syntax.begin.strip(), syntax.end.strip()
        # Without a mark only an answer that begins as a call can be one.
        self._state: Literal["text", "start", "between", "object", "plain"] = (
            "text" if self._mark else "start"
        )
        self._held = ""
        self._object = JsonObject()
        # What stands before the object, should it be no call in the end.
        self._opening = ""
        self._begun: CallBegun | None = None
        self._num_arguments_sent = 0
        self.num_calls = 0

    def push(self, text: str) -> list[ReadPart]:
        """Take more text."""
        parts: list[ReadPart] = []
        self._held += text
        while self._held and self._step(parts):
            pass
        return _joined(parts)

    def flush(self) -> list[ReadPart]:
        """Return what is left when no more text can come; a call that was begun stays as far as it came."""
        parts: list[ReadPart] = []
        if self._state == "object" and self._begun is None:
            self._report(parts, self._opening + self._object.slice())
        elif self._state in {"text", "start"} and not (self.num_calls and not self._held.strip()):
            self._report(parts, self._held)
        self._held = ""
        return parts

    def _step(self, parts: list[ReadPart]) -> bool:
        """Move on over what is held; False when more text must come first."""
        if self._state == "plain":
            self._report(parts, self._held)
            self._held = ""
            return False
        if self._state == "text":
            return self._step_text(parts)
        if self._state == "object":
            return self._step_object(parts)
        return self._step_between()

    def _step_text(self, parts: list[ReadPart]) -> bool:
        at = self._held.find(self._mark)
        if at >= 0:
            self._report(parts, self._held[:at].rstrip())
            self._opening = self._held[at : at + len(self._mark)]
            self._held = self._held[at + len(self._mark) :]
            self._state = "between"
            return True
        kept = _num_kept(self._held, self._mark)
        decided = self._held[: len(self._held) - kept]
        self._report(parts, decided)
        self._held = self._held[len(decided) :]
        return False

    def _step_between(self) -> bool:
        """Before, between and after objects: only brackets, commas and white space may stand there."""
        stripped = self._held.lstrip(" \t\r\n,;[]" if self._state == "between" else " \t\r\n[")
        if not stripped:
            return False
        if self._state == "between" and self._end and self._end.startswith(stripped[: len(self._end)]):
            if len(stripped) < len(self._end):
                return False
            self._held = stripped[len(self._end) :].lstrip()
            self._opening, self._state = "", "text"
            return True
        if stripped[0] == "{":
            self._opening += self._held[: len(self._held) - len(stripped)]
            self._held = stripped
            self._object, self._begun, self._num_arguments_sent = JsonObject(), None, 0
            self._state = "object"
            return True
        # No call after all.
        self._held = self._opening + self._held
        self._opening = ""
        self._state = "plain"
        return True

    def _step_object(self, parts: list[ReadPart]) -> bool:
        for at, letter in enumerate(self._held):
            self._object.push(letter)
            self._follow(parts)
            if self._object.is_whole:
                self._held = self._held[at + 1 :]
                self._end_object(parts)
                return True
        self._held = ""
        return False

    def _follow(self, parts: list[ReadPart]) -> None:
        """Report a call as soon as its name is known and its arguments have begun as an object."""
        found = self._object
        if found.key != self._syntax.arguments_key or found.value_at < 0:
            return
        if self._begun is None:
            name = load(found.values.get(self._syntax.name_key))
            if found.slice(found.value_at, found.value_at + 1) != "{" or name not in self._names:
                return
            self._begin(parts, name)
        # White space behind the arguments is none of theirs.
        if found.depth > 1 or found.slice(-1) == "}":
            self._report_arguments(parts, found.slice(found.value_at + self._num_arguments_sent))

    def _begin(self, parts: list[ReadPart], name: str) -> None:
        length = _SHORT_ID_LENGTH if self._syntax.has_short_ids else _ID_LENGTH
        letters = "".join(secrets.choice(_ID_LETTERS) for _ in range(length))
        self._begun = CallBegun(
            self.num_calls, letters if length == _SHORT_ID_LENGTH else f"call_{letters}", name
        )
        self.num_calls += 1
        if self._is_reported:
            parts.append(self._begun)

    def _report_arguments(self, parts: list[ReadPart], more: str) -> None:
        self._num_arguments_sent += len(more)
        if more and self._begun is not None and self._is_reported:
            parts.append(CallArguments(self._begun.place, more))

    def _end_object(self, parts: list[ReadPart]) -> None:
        if self._begun is None:
            values = self._object.values
            name = load(values.get(self._syntax.name_key))
            arguments = values.get(self._syntax.arguments_key, "{}")
            if arguments.startswith('"'):
                # Some models quote them, as the wire does.
                arguments = load(arguments) or ""
            if name not in self._names or not isinstance(load(arguments), dict):
                self._held = self._opening + self._object.slice() + self._held
                self._state = "plain"
                return
            self._begin(parts, name)
            self._report_arguments(parts, arguments)
        self._opening, self._state = "", "between"

    @property
    def _is_reported(self) -> bool:
        return self._is_parallel or self.num_calls <= 1

    def _report(self, parts: list[ReadPart], text: str) -> None:
        if text:
            parts.append(text)


def _num_kept(text: str, mark: str) -> int:
    """Return how much of a text's end may be white space before a mark, or the mark's beginning."""
    partial = next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0)
    before = text[: len(text) - partial]
    return partial + len(before) - len(before.rstrip())


def _joined(parts: list[ReadPart]) -> list[ReadPart]:
    """Join pieces of the same call's arguments, which come by the character."""
    joined: list[ReadPart] = []
    for part in parts:
        last = joined[-1] if joined else None
        if isinstance(part, CallArguments) and isinstance(last, CallArguments) and part.place == last.place:
            joined[-1] = CallArguments(part.place, last.text + part.text)
        elif isinstance(part, str) and isinstance(last, str):
            joined[-1] = last + part
        else:
            joined.append(part)
    return joined


@dataclass
class JsonObject:
    """An object as far as it came, from its first bracket on.

    `key` is the last key of its own members, `value_at` where that one's value begins, -1 before it does;
    `values` are the JSON texts of the members that are whole.
    """

    depth: int = 0
    key: str | None = None
    value_at: int = -1
    values: dict[str, str] = field(default_factory=dict)
    _letters: list[str] = field(default_factory=list)
    _is_in_string: bool = False
    _is_escaped: bool = False
    _string_at: int = -1

    @property
    def is_whole(self) -> bool:
        """Whether the last bracket is closed."""
        return self.depth == 0 and bool(self._letters)

    def slice(self, start: int = 0, end: int | None = None) -> str:
        """Return the text from one place to another."""
        return "".join(self._letters[start:end])

    def push(self, letter: str) -> None:
        """Take the next character."""
        at = len(self._letters)
        self._letters.append(letter)
        if self._is_in_string:
            self._push_in_string(letter, at)
            return
        is_own = self.depth == 1
        if is_own and self.key is not None and self.value_at < 0 and letter not in ": \t\r\n":
            self.value_at = at
        if letter == '"':
            self._is_in_string = True
            self._string_at = at
        elif letter in "{[":
            self.depth += 1
        elif letter in "}]":
            if is_own:
                self._end_value(at)
            self.depth -= 1
        elif letter == "," and is_own:
            self._end_value(at)

    def _push_in_string(self, letter: str, at: int) -> None:
        if self._is_escaped:
            self._is_escaped = False
        elif letter == "\\":
            self._is_escaped = True
        elif letter == '"':
            self._is_in_string = False
            if self.depth == 1 and self.key is None:
                self.key = load(self.slice(self._string_at, at + 1))

    def _end_value(self, at: int) -> None:
        if self.key is not None and self.value_at >= 0:
            self.values[self.key] = self.slice(self.value_at, at).rstrip()
        self.key, self.value_at = None, -1
