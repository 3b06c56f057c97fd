"""The text of an answer, piece by piece, parted into content and calls of tools. Text only.

Arguments leave as they come, once the call's name is known: a stream shows them while they are written.
"""

import secrets
import string
from dataclasses import dataclass
from typing import Literal

from luthier.inference.openai.fields import JsonObject, load
from luthier.inference.openai.tool_calls import CallSyntax

_ID_LETTERS = string.ascii_letters + string.digits
_LONG_ID, _SHORT_ID = 24, 9


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
        length = _SHORT_ID if self._syntax.has_short_ids else _LONG_ID
        letters = "".join(secrets.choice(_ID_LETTERS) for _ in range(length))
        self._begun = CallBegun(self.num_calls, letters if length == _SHORT_ID else f"call_{letters}", name)
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
