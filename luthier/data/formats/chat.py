"""OpenAI's chat rows: `{"messages": [{"role", "content", …}, …], "tools"?, …}`.

Rows of texts alone take a fast reader; a row with anything else is checked rule by rule. Unknown keys are
refused, so that nothing a user wrote is silently left out of the training.
"""

from typing import Annotated, Any, Literal

import msgspec

from luthier.data.formats._json_line import parse_line
from luthier.data.formats._messages import check_messages, to_turns
from luthier.data.formats._tools import Broken, check_definitions, to_definitions
from luthier.data.formats.base import Fault, Row, Turn, escape_text

_KEYS = ("messages", "tools", "parallel_tool_calls", "functions")


class _TextPart(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["text"]
    text: str


class _Message(msgspec.Struct, forbid_unknown_fields=True):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[_TextPart], msgspec.Meta(min_length=1)]
    name: str | msgspec.UnsetType = msgspec.UNSET
    weight: Literal[0, 1] | msgspec.UnsetType = msgspec.UNSET


class _PlainRow(msgspec.Struct, forbid_unknown_fields=True):
    messages: Annotated[list[_Message], msgspec.Meta(min_length=1)]


_DECODER = msgspec.json.Decoder(_PlainRow)


def _has_each_key_once(row: _PlainRow, line: bytes) -> bool:
    """Whether keys can't have come twice, judged by how often they are spelled in the line.

    The decoder keeps the last of two equal keys. Counting is cheap; a line on which the counts differ (for
    instance because a text is just "role") is looked at slowly.
    """
    num_parts = num_names = num_weights = 0
    for message in row.messages:
        num_names += message.name is not msgspec.UNSET
        num_weights += message.weight is not msgspec.UNSET
        if isinstance(message.content, list):
            num_parts += len(message.content)
    return (
        line.count(b'"messages"') == 1
        and line.count(b'"role"') == len(row.messages)
        and line.count(b'"content"') == len(row.messages)
        and line.count(b'"name"') == num_names
        and line.count(b'"weight"') == num_weights
        and (num_parts == 0 or (line.count(b'"type"') == line.count(b'"text":') == num_parts))
    )


def _to_turn(message: _Message) -> Turn:
    content = message.content
    return Turn(
        role=message.role,
        content=content if isinstance(content, str) else "".join(part.text for part in content),
        name=None if isinstance(message.name, msgspec.UnsetType) else message.name,
        is_trained=message.role == "assistant" and message.weight != 0,
    )


def _read_plain(line: bytes) -> _PlainRow | None:
    """Return a row that holds texts alone and breaks no rule; None for all others."""
    try:
        row = _DECODER.decode(line)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    if row.messages[-1].role != "assistant":
        return None
    for message in row.messages:
        if message.weight is not msgspec.UNSET and message.role != "assistant":
            return None
    if not _has_each_key_once(row, line) and isinstance(parse_line(line, 1), Fault):
        return None
    return row


class ChatFormat:
    """Rows of `messages` whose last is the assistant's."""

    name = "chat"
    signature = frozenset({"messages"})
    keys = frozenset(_KEYS)
    json_keys = frozenset(_KEYS)

    def accepts(self, line: bytes) -> bool:
        """Say fast whether a line breaks no rule."""
        return _read_plain(line) is not None or self._read_any(line) is not None

    def read(self, line: bytes) -> Row | None:
        """Read a line fast; None when it breaks a rule."""
        plain = _read_plain(line)
        if plain is not None:
            return Row([_to_turn(message) for message in plain.messages])
        row = self._read_any(line)
        return None if row is None else Row(to_turns(row["messages"]), to_definitions(row))

    def explain(self, row: dict[str, Any], number: int) -> list[Fault]:
        """Return the faults of a row that `read` refused."""
        faults = [Fault(number, None, field, rule, message) for field, rule, message in _check_row(row)]
        return faults or [
            Fault(number, None, None, "row.unreadable", "The line can't be read as a chat row.")
        ]

    def _read_any(self, line: bytes) -> dict[str, Any] | None:
        row = parse_line(line, 1)
        return None if isinstance(row, Fault) or _check_row(row) else row


def _check_row(row: dict[str, Any]) -> list[Broken]:
    broken: list[Broken] = [
        (escape_text(key), "row.unknown_key", f"Unknown key; a chat row has {', '.join(_KEYS)}.")
        for key in row
        if key not in _KEYS
    ]
    broken += check_definitions(row)
    parallel = row.get("parallel_tool_calls")
    if parallel is not None and not isinstance(parallel, bool):
        told = '"parallel_tool_calls" must be true or false.'
        broken.append(("parallel_tool_calls", "row.parallel_tool_calls", told))
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        what = "is missing" if "messages" not in row else "must be a list with at least one message"
        return [*broken, ("messages", "messages.type", f'"messages" {what}.')]
    broken += check_messages(messages, "messages", is_parallel_allowed=parallel is not False)
    if not broken and messages[-1]["role"] != "assistant":
        path = f"messages[{len(messages) - 1}].role"
        if any(message["role"] == "assistant" for message in messages):
            told = "The last message must be the assistant's; drop what follows it."
            broken.append((path, "messages.last", told))
        else:
            told = "The row has no assistant message to learn from; add one."
            broken.append((path, "messages.no_assistant", told))
    return broken


FORMAT = ChatFormat()
