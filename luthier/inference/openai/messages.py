"""The messages of a chat as clients write them, checked and flattened to what a template takes."""

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from luthier.core.errors import (
    InvalidTypeError,
    InvalidValueError,
    MissingParameterError,
    UnsupportedValueError,
)
from luthier.data.json_values import MAX_VALUES, max_num_values
from luthier.inference.openai.fields import drop_ignored, drop_neutral, load, validate, without_nulls

# Of all messages of a request: pydantic keeps the interpreter's lock while it checks them.
_MAX_TOOL_CALLS = 4096

# Parts of an earlier answer that clients send back as they got them.
IGNORED_MESSAGE_FIELDS = frozenset({"refusal", "annotations", "audio", "reasoning_content"})
_MESSAGE_NEUTRAL: dict[str, tuple[Any, ...]] = {"function_call": ()}
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}


class _Function(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    name: str
    arguments: str


class ToolCall(BaseModel):
    """A call of a tool in an earlier answer."""

    # Clients that put a call together from a stream leave its `index` in it.
    model_config = ConfigDict(extra="ignore", strict=True)
    id: str
    type: Literal["function"]
    function: _Function


class ChatMessage(BaseModel):
    """One message, its content flattened to text; None beside an assistant's calls of tools alone."""

    model_config = ConfigDict(extra="forbid", strict=True)
    role: Literal["system", "user", "assistant", "tool"]
    content: str | None
    name: str | None = None
    tool_calls: list[ToolCall] = []
    tool_call_id: str | None = None

    def to_message(self) -> dict[str, Any]:
        """Return the message for a chat template, as training's Turn.to_message does."""
        message: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.name is not None:
            message["name"] = self.name
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        if self.tool_calls:
            message["tool_calls"] = [call.model_dump() for call in self.tool_calls]
        return message


def flatten_messages(messages: Any) -> Any:
    """Return messages with their contents as texts, ready to be checked as ChatMessage.

    Returns:
        The flattened list; what is no list of objects as it is.

    Raises:
        InvalidRequestError: for a part, a role or a field that is not supported.
    """
    if not isinstance(messages, list):
        return messages
    calls = (message.get("tool_calls") for message in messages if isinstance(message, dict))
    if sum(len(each) for each in calls if isinstance(each, list)) > _MAX_TOOL_CALLS:
        raise InvalidValueError(
            f"The messages may have {_MAX_TOOL_CALLS} tool calls in all.", param="messages"
        )
    return [flatten_message(message, f"messages.{i}") for i, message in enumerate(messages)]


def flatten_message(message: Any, param: str) -> Any:
    """Return one message with its content as a text; the rest is as in `flatten_messages`."""
    if not isinstance(message, dict):
        return message
    fields = without_nulls(message)
    drop_ignored(fields, IGNORED_MESSAGE_FIELDS)
    drop_neutral(fields, _MESSAGE_NEUTRAL, f"{param}.")
    role = fields.get("role")
    if isinstance(role, str):
        if role == "function":
            raise UnsupportedValueError(
                "Messages of role function are not supported by this server; send tool calls and messages "
                "of role tool.",
                param=f"{param}.role",
            )
        if role not in _ROLES:
            raise InvalidValueError(
                f"{role[:40]!r} is no role of a message; it is one of {', '.join(_ROLES)}.",
                param=f"{param}.role",
            )
        fields["role"] = _ROLES[role]
    if fields.get("tool_calls") == []:
        del fields["tool_calls"]
    _check_calls(fields, param)
    if "content" not in fields and role == "assistant":
        fields["content"] = None if "tool_calls" in fields else ""
    if isinstance(fields.get("content"), list):
        fields["content"] = _join_parts(fields["content"], f"{param}.content")
    return fields


def check_arguments(messages: Sequence[ChatMessage], param: str) -> None:
    """Refuse calls whose arguments, JSON within a text, have too many values in all."""
    calls = [call for message in messages for call in message.tool_calls]
    if sum(max_num_values(call.function.arguments.encode()) for call in calls) > MAX_VALUES:
        raise _too_many_values(param)


def _too_many_values(param: str) -> InvalidValueError:
    return InvalidValueError(
        f"The arguments of tool calls may have {MAX_VALUES} JSON values in all.", param=param
    )


def _check_calls(fields: dict[str, Any], param: str) -> None:
    """Check what only the messages of one role have, and that arguments are what templates can write."""
    for name, owner in (("tool_calls", "assistant"), ("tool_call_id", "tool")):
        if name in fields and fields.get("role") != owner:
            raise InvalidValueError(f"Only {owner} messages have {name}; remove it.", param=f"{param}.{name}")
    if fields.get("role") == "tool" and not isinstance(fields.get("tool_call_id"), str):
        raise MissingParameterError(
            "A tool's message names the call that it answers.", param=f"{param}.tool_call_id"
        )
    if not isinstance(fields.get("tool_calls", []), list):
        raise InvalidTypeError("tool_calls must be a list.", param=f"{param}.tool_calls")
    for i, call in enumerate(fields.get("tool_calls", [])):
        checked = validate(ToolCall, call, f"{param}.tool_calls.{i}.")
        if max_num_values(checked.function.arguments.encode()) > MAX_VALUES:
            raise _too_many_values(f"{param}.tool_calls.{i}.function.arguments")
        if not isinstance(load(checked.function.arguments), dict):
            raise InvalidValueError(
                "The arguments of a tool call must be a string that holds a JSON object.",
                param=f"{param}.tool_calls.{i}.function.arguments",
            )


def _join_parts(parts: list[Any], param: str) -> str:
    texts = []
    for i, part in enumerate(parts):
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise InvalidTypeError("A content part must be an object with a type.", param=f"{param}.{i}")
        if part["type"] != "text":
            raise UnsupportedValueError(
                "Only text parts are supported by this server.", param=f"{param}.{i}.type"
            )
        if not isinstance(part.get("text"), str):
            raise InvalidTypeError("The text of a text part must be a string.", param=f"{param}.{i}.text")
        texts.append(part["text"])
    return "".join(texts)
