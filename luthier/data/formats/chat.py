"""OpenAI's chat rows: `{"messages": [{"role", "content", "name"?, "weight"?}, …]}`, one a line.

What the API of OpenAI takes besides (tools, images) is refused by name until it is supported, and unknown
keys are refused, so that nothing a user wrote is silently left out of the training.
"""

from typing import Annotated, Any, Literal

import msgspec

from luthier.data.formats._json_line import parse_line
from luthier.data.formats.base import Fault, Turn, escape_text

_ROLES = ("system", "developer", "user", "assistant")
_UNSUPPORTED_ROW_KEYS = ("tools", "functions", "parallel_tool_calls")
_UNSUPPORTED_MESSAGE_KEYS = ("tool_calls", "function_call", "tool_call_id", "audio", "refusal")
_UNSUPPORTED_ROLES = ("tool", "function")


class _TextPart(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["text"]
    text: str


class _Message(msgspec.Struct, forbid_unknown_fields=True):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[_TextPart], msgspec.Meta(min_length=1)]
    name: str | msgspec.UnsetType = msgspec.UNSET
    weight: Literal[0, 1] | msgspec.UnsetType = msgspec.UNSET


class _Row(msgspec.Struct, forbid_unknown_fields=True):
    messages: Annotated[list[_Message], msgspec.Meta(min_length=1)]


_DECODER = msgspec.json.Decoder(_Row)


def _has_each_key_once(row: _Row, line: bytes) -> bool:
    """Whether keys can't have come twice, judged by how often they are spelled in the line.

    The decoder keeps the last of two equal keys. Counting is cheap; a line on which the counts differ (for
    instance because a text is just "role") is looked at slowly.
    """
    num_parts = sum(len(message.content) for message in row.messages if isinstance(message.content, list))
    num_names = sum(message.name is not msgspec.UNSET for message in row.messages)
    num_weights = sum(message.weight is not msgspec.UNSET for message in row.messages)
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


class ChatFormat:
    """Rows of `messages` whose last is the assistant's."""

    name = "chat"

    def read(self, line: bytes) -> list[Turn] | None:
        """Read a line fast; None when it breaks a rule."""
        try:
            row = _DECODER.decode(line)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return None
        if row.messages[-1].role != "assistant":
            return None
        if any(m.weight is not msgspec.UNSET and m.role != "assistant" for m in row.messages):
            return None
        if not _has_each_key_once(row, line) and isinstance(parse_line(line, 1), Fault):
            return None
        return [_to_turn(message) for message in row.messages]

    def explain(self, line: bytes, number: int) -> list[Fault]:
        """Return the faults of a line that `read` refused."""
        row = parse_line(line, number)
        if isinstance(row, Fault):
            return [row]
        faults = [Fault(number, None, field, rule, message) for field, rule, message in _check_row(row)]
        return faults or [
            Fault(number, None, None, "row.unreadable", "The line can't be read as a chat row.")
        ]


# A broken rule without its line: field, rule, message.
_Broken = tuple[str, str, str]


def _check_row(row: dict[str, Any]) -> list[_Broken]:
    broken: list[_Broken] = []
    for key in row:
        if key in _UNSUPPORTED_ROW_KEYS:
            broken.append((key, "row.unsupported", f'"{key}" is not supported yet; remove it.'))
        elif key != "messages":
            path = escape_text(key)
            broken.append((path, "row.unknown_key", 'Unknown key; a row has the key "messages" alone.'))
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        what = "is missing" if "messages" not in row else "must be a list with at least one message"
        return [*broken, ("messages", "messages.type", f'"messages" {what}.')]
    for place, message in enumerate(messages):
        broken += _check_message(message, f"messages[{place}]")
    if not broken and messages[-1]["role"] != "assistant":
        path = f"messages[{len(messages) - 1}].role"
        if any(message["role"] == "assistant" for message in messages):
            broken.append(
                (path, "messages.last", "The last message must be the assistant's; drop what follows it.")
            )
        else:
            broken.append(
                (path, "messages.no_assistant", "The row has no assistant message to learn from; add one.")
            )
    return broken


def _check_message(message: Any, path: str) -> list[_Broken]:
    if not isinstance(message, dict):
        return [(path, "message.type", "A message must be an object with role and content.")]
    broken: list[_Broken] = []
    for key in message:
        if key in _UNSUPPORTED_MESSAGE_KEYS:
            broken.append(
                (f"{path}.{key}", "message.unsupported", f'"{key}" is not supported yet; remove it.')
            )
        elif key not in ("role", "content", "name", "weight"):
            broken.append(
                (
                    f"{path}.{escape_text(key)}",
                    "message.unknown_key",
                    "Unknown key; a message has role, content, name and weight.",
                )
            )
    broken += _check_role(message, path)
    if not (broken and "content" not in message):
        broken += _check_content(message, path)
    if "name" in message and not isinstance(message["name"], str):
        broken.append((f"{path}.name", "message.name", '"name" must be a string.'))
    if "weight" in message:
        broken += _check_weight(message, path)
    return broken


def _check_role(message: dict[str, Any], path: str) -> list[_Broken]:
    role = message.get("role")
    if role in _ROLES:
        return []
    if role in _UNSUPPORTED_ROLES:
        return [
            (f"{path}.role", "message.unsupported", f'The role "{role}" is not supported yet; remove it.')
        ]
    what = "is missing" if "role" not in message else "is unknown"
    return [(f"{path}.role", "message.role", f'"role" {what}; it is one of {", ".join(_ROLES)}.')]


def _check_weight(message: dict[str, Any], path: str) -> list[_Broken]:
    weight = message["weight"]
    if message.get("role") != "assistant":
        return [(f"{path}.weight", "message.weight", "Only assistant messages have a weight; remove it.")]
    if isinstance(weight, bool) or not isinstance(weight, int) or weight not in (0, 1):
        return [(f"{path}.weight", "message.weight", "The weight must be the integer 0 or 1.")]
    return []


def _check_content(message: dict[str, Any], path: str) -> list[_Broken]:
    if "content" not in message:
        return [(f"{path}.content", "message.content", '"content" is missing; it must be a string.')]
    content = message["content"]
    if isinstance(content, str):
        return []
    if not isinstance(content, list) or not content:
        return [(f"{path}.content", "message.content", '"content" must be a string.')]
    for place, part in enumerate(content):
        part_path = f"{path}.content[{place}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in ("image_url", "input_audio", "file", "refusal"):
            return [
                (f"{part_path}.type", "content.unsupported", f'"{kind}" is not supported yet; text only.')
            ]
        if kind != "text" or not isinstance(part.get("text"), str) or len(part) != 2:
            return [(part_path, "content.part", 'A part must be {"type": "text", "text": "..."}.')]
    return []


FORMAT = ChatFormat()
