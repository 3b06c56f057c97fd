"""A JSON object while it is being written: which of its members are whole, and when it ends. Text only."""

import json
from dataclasses import dataclass, field
from typing import Any


def load(text: str | None) -> Any:
    """Return the value of a JSON text, None for what is none."""
    try:
        return None if text is None else json.loads(text)
    except (ValueError, RecursionError):
        return None


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
