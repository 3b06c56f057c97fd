"""The messages of a chat as clients write them, checked and flattened to what a template takes."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from luthier.core.errors import InvalidTypeError, UnsupportedValueError
from luthier.inference.fields import drop_ignored, drop_neutral, without_nulls

# Parts of an earlier answer that clients send back as they got them.
IGNORED_MESSAGE_FIELDS = frozenset({"refusal", "annotations", "audio", "reasoning_content"})
_MESSAGE_NEUTRAL: dict[str, tuple[Any, ...]] = {"tool_calls": ([],), "function_call": ()}
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_UNSUPPORTED_ROLES = frozenset({"tool", "function"})


class ChatMessage(BaseModel):
    """One message, its content flattened to text."""

    model_config = ConfigDict(extra="forbid", strict=True)
    role: Literal["system", "user", "assistant"]
    content: str
    name: str | None = None

    def to_message(self) -> dict[str, str]:
        """Return the message for a chat template, as training's Turn.to_message does."""
        message = {"role": self.role, "content": self.content}
        return message if self.name is None else message | {"name": self.name}


def flatten_messages(messages: Any) -> Any:
    """Return messages with their contents as texts, ready to be checked as ChatMessage.

    Args:
        messages: as the client sent them.

    Returns:
        The flattened list; what is no list of objects as it is.

    Raises:
        InvalidRequestError: for a part, a role or a field that is not supported.
    """
    if not isinstance(messages, list):
        return messages
    return [_flatten_message(message, f"messages.{i}") for i, message in enumerate(messages)]


def _flatten_message(message: Any, param: str) -> Any:
    if not isinstance(message, dict):
        return message
    fields = without_nulls(message)
    drop_ignored(fields, IGNORED_MESSAGE_FIELDS)
    drop_neutral(fields, _MESSAGE_NEUTRAL, f"{param}.")
    role = fields.get("role")
    if isinstance(role, str):
        if role in _UNSUPPORTED_ROLES:
            raise UnsupportedValueError(
                f"Messages of role {role} are not supported by this server yet.", param=f"{param}.role"
            )
        fields["role"] = _ROLES.get(role, role)
    if "content" not in fields and role == "assistant":
        fields["content"] = ""
    if isinstance(fields.get("content"), list):
        fields["content"] = _join_parts(fields["content"], f"{param}.content")
    return fields


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
