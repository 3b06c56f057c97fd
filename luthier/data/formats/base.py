"""The interface of a row format: a file of this folder with a `RowFormat` named FORMAT.

A fault names its line, its place and its rule; it never quotes more than 40 escaped characters of a row.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_MAX_QUOTED_CHARS = 40
_NUM_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Fault:
    """One broken rule.

    `line` and `column` count from 1; `column` is in characters, None where a field says it better. `field`
    is a path such as `messages[2].weight`, None for the whole line. `rule` is a stable name.
    `row` is the number of the row, from 1, in files that are no lines: a JSON array, Parquet.
    """

    line: int
    column: int | None
    field: str | None
    rule: str
    message: str
    row: int | None = None

    def __str__(self) -> str:
        place = f"Line {self.line}"
        if self.row is not None:
            place = f"Row {self.row}" if self.row == self.line else f"Row {self.row} (line {self.line})"
        if self.column is not None:
            place += f", column {self.column}"
        if self.field is not None:
            place += f", {self.field}"
        return f"{place}: {self.message}"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool by the assistant; `arguments` is the parsed object."""

    id: str
    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation, its parts joined. `is_trained` is True on assistant turns alone.

    `content` is None only beside `tool_calls`. `tool_call_id` says which call a tool's
    turn answers. `reasoning` is what the assistant thought before it answered.
    """

    role: str
    content: str | None
    name: str | None
    is_trained: bool
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    reasoning: str | None = None

    def to_message(self) -> dict[str, Any]:
        """Return the turn as transformers documents messages: the arguments of a tool call are an object."""
        message: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.name is not None:
            message["name"] = self.name
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        if self.reasoning is not None:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in self.tool_calls
            ]
        return message


@dataclass(frozen=True, slots=True)
class Row:
    """One training example.

    `turns` is the conversation. `tools` are the tools' definitions as OpenAI has them, None without any.
    `rejected` is, of a preference, the whole conversation with the answer that is not preferred: it begins
    with the same turns as `turns`, which ends with the preferred one. `is_plain` says that the texts of the
    turns follow each other with no chat template, an end of text after the last.
    """

    turns: Sequence[Turn]
    tools: list[dict[str, Any]] | None = None
    rejected: Sequence[Turn] | None = None
    is_plain: bool = False


# A broken rule without its line: field, rule, message.
Broken = tuple[str, str, str]


class RowFormat(ABC):
    """A way to write one training row as one JSON object.

    `keys` are all keys that a row may have. A row that has all of `signature` is of this format, unless it
    has all of a longer signature too. `json_keys` are those that hold JSON where a table has only texts.
    """

    name: str
    signature: frozenset[str]
    keys: frozenset[str]
    json_keys: frozenset[str] = frozenset()

    @abstractmethod
    def check(self, row: dict[str, Any]) -> list[Broken]:
        """Return the rules that a row breaks; the row is as `parse_line` returns it."""

    @abstractmethod
    def make_row(self, row: dict[str, Any]) -> Row:
        """Return a row that breaks no rule."""

    def accepts_by_type(self, line: bytes) -> bool:  # noqa: ARG002
        """Whether the types of a line's values show that it breaks no rule; if not, `check` decides."""
        return False


def escape_text(text: str) -> str:
    """Return the beginning of a user's text, escaped, in at most 40 characters."""
    return text[:_MAX_QUOTED_CHARS].encode("unicode_escape").decode()[:_MAX_QUOTED_CHARS]


def check_keys(
    fields: Iterable[str], known: Collection[str], at: str, rule: str, advice: str
) -> list[Broken]:
    """Return a broken rule for each unknown key of an object whose fields begin with `at`."""
    return [(at + escape_text(key), rule, f"Unknown key; {advice}") for key in fields if key not in known]


def check_type(
    fields: Mapping[str, Any], key: str, kind: type, at: str, rule: str, what: str
) -> list[Broken]:
    """Return a broken rule when a field, which may be absent or null, is of another type."""
    if fields.get(key) is None or isinstance(fields[key], kind):
        return []
    return [(at + key, rule, f'"{key}" must be {what}.')]


def describe_choice(fields: Mapping[str, Any], key: str, choices: Iterable[str]) -> str:
    """Return what is wrong with a field that must have one of some values."""
    value = fields.get(key)
    if key not in fields:
        what = "is missing"
    elif isinstance(value, str):
        what = f"'{escape_text(value)}' is unknown"
    else:
        what = "is no text"
    return f'"{key}" {what}; it is one of {", ".join(choices)}.'


def summarize_faults(faults: Sequence[Fault]) -> str:
    """Return the first few faults as sentences, a line each, and how many more there are."""
    shown = [str(fault) for fault in faults[:_NUM_SHOWN]]
    num_more = len(faults) - len(shown)
    return "\n".join([*shown, f"And {num_more} more."] if num_more else shown)
