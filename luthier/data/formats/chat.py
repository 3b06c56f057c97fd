"""OpenAI's chat rows: `{"messages": [{"role", "content", …}, …], "tools"?, …}`.

Unknown keys are refused, so that nothing a user wrote is silently left out of the training.
"""

from typing import Annotated, Any, Literal

import msgspec

from luthier.data.formats._messages import check_answers, check_each, to_turns
from luthier.data.formats._tools import check_definitions, to_definitions
from luthier.data.formats.base import Broken, Row, RowFormat, check_keys, check_type
from luthier.data.json_values import MAX_VALUES, max_num_values

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

    The decoder keeps the last of two equal keys.
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


class ChatFormat(RowFormat):
    """Rows of `messages` whose last is the assistant's."""

    name = "chat"
    signature = frozenset({"messages"})
    keys = frozenset(_KEYS)
    json_keys = frozenset(_KEYS)

    def accepts_by_type(self, line: bytes) -> bool:
        """Accept rows of texts alone: an upload's check takes a third of the time."""
        try:
            row = _DECODER.decode(line)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return False
        has_weights = any(one.weight is not msgspec.UNSET and one.role != "assistant" for one in row.messages)
        is_small = max_num_values(line) <= MAX_VALUES
        return (
            is_small
            and row.messages[-1].role == "assistant"
            and not has_weights
            and _has_each_key_once(row, line)
        )

    def make_row(self, row: dict[str, Any]) -> Row:
        return Row(to_turns(row["messages"]), to_definitions(row))

    def check(self, row: dict[str, Any]) -> list[Broken]:
        broken = check_keys(row, _KEYS, "", "row.unknown_key", f"a chat row has {', '.join(_KEYS)}.")
        broken += check_definitions(row)
        key = "parallel_tool_calls"
        broken += check_type(row, key, bool, "", f"row.{key}", "true or false")
        messages = row.get("messages")
        if not isinstance(messages, list) or not messages:
            what = "is missing" if "messages" not in row else "must be a list with at least one message"
            return [*broken, ("messages", "messages.type", f'"messages" {what}.')]
        found = check_each(messages, "messages", is_parallel_allowed=row.get(key) is not False)
        broken += found or check_answers(messages, "messages")
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
