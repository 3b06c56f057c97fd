"""OpenAI's chat rows: `{"messages": [{"role", "content", …}, …], "tools"?, …}`.

Rows of texts alone take a fast reader; a row with anything else is checked rule by rule. Unknown keys are
refused, so that nothing a user wrote is silently left out of the training.
"""

from typing import Annotated, Any, Literal

import msgspec

from luthier.data.formats._json_line import CheckedFormat, parse_line
from luthier.data.formats._messages import check_messages, to_turns
from luthier.data.formats._tools import check_definitions, to_definitions
from luthier.data.formats.base import Broken, Fault, Row, Turn, escape_text

_KEYS = ("messages", "tools", "parallel_tool_calls", "functions")


class _TextPart(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["text"]
    text: str


class _Message(msgspec.Struct, forbid_unknown_fields=True):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[_TextPart], msgspec.Meta(min_length=1)]
    name: str | msgspec.UnsetType = msgspec.UNSET
    weight: Literal[0, 1] | msgspec.UnsetType = msgspec.UNSET


class _TextRow(msgspec.Struct, forbid_unknown_fields=True):
    messages: Annotated[list[_Message], msgspec.Meta(min_length=1)]


_DECODER = msgspec.json.Decoder(_TextRow)


def _has_each_key_once(row: _TextRow, line: bytes) -> bool:
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


def _read_texts(line: bytes) -> _TextRow | None:
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


class ChatFormat(CheckedFormat):
    """Rows of `messages` whose last is the assistant's."""

    name = "chat"
    signature = frozenset({"messages"})
    keys = frozenset(_KEYS)
    json_keys = frozenset(_KEYS)

    def accepts(self, line: bytes) -> bool:
        """Whether a line breaks no rule; texts alone are read fast."""
        return _read_texts(line) is not None or super().accepts(line)

    def read(self, line: bytes) -> Row | None:
        """Return the row of a line; texts alone are read fast."""
        texts = _read_texts(line)
        if texts is not None:
            return Row([_to_turn(message) for message in texts.messages])
        row = self.parse(line)
        return None if row is None else Row(to_turns(row["messages"]), to_definitions(row))

    def check(self, row: dict[str, Any]) -> list[Broken]:
        """Return the rules that a row breaks."""
        broken: list[Broken] = [
            (escape_text(key), "row.unknown_key", f"Unknown key; a chat row has {', '.join(_KEYS)}.")
            for key in row
            if key not in _KEYS
        ]
        broken += check_definitions(row)
        parallel = row.get("parallel_tool_calls")
        if parallel is not None and not isinstance(parallel, bool):
            advice = '"parallel_tool_calls" must be true or false.'
            broken.append(("parallel_tool_calls", "row.parallel_tool_calls", advice))
        messages = row.get("messages")
        if not isinstance(messages, list) or not messages:
            what = "is missing" if "messages" not in row else "must be a list with at least one message"
            return [*broken, ("messages", "messages.type", f'"messages" {what}.')]
        broken += check_messages(messages, "messages", is_parallel_allowed=parallel is not False)
        if not broken and messages[-1]["role"] != "assistant":
            path = f"messages[{len(messages) - 1}].role"
            if any(message["role"] == "assistant" for message in messages):
                advice = "The last message must be the assistant's; drop what follows it."
                broken.append((path, "messages.last", advice))
            else:
                advice = "The row has no assistant message to learn from; add one."
                broken.append((path, "messages.no_assistant", advice))
        return broken


FORMAT = ChatFormat()
