"""What form an answer shall have: `response_format` of chats, `text.format` of responses. Parses only."""

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from luthier.core.errors import InvalidTypeError, UnsupportedValueError
from luthier.inference.openai.fields import validate, without_nulls
from luthier.inference.openai.grammar import json_rule

_NAME = r"^[a-zA-Z0-9_-]{1,64}$"


@dataclass(frozen=True)
class AnswerFormat:
    """An answer that must be JSON of a schema. `param` is the field that holds the schema."""

    schema: dict[str, Any]
    param: str

    def to_rule(self) -> str:
        """Return the right side of the answer's rule in a grammar."""
        return json_rule(self.schema, param=self.param)


class _Plain(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["text", "json_object"]


class _Schema(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    name: str = Field(pattern=_NAME)
    schema_: dict[str, Any] = Field({"type": "object"}, alias="schema")
    description: str | None = None
    # Every schema is enforced, whether strict or not.
    strict: bool = False


class _ChatSchema(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["json_schema"]
    json_schema: dict[str, Any]


def read_chat_format(value: Any) -> AnswerFormat | None:
    """Check the `response_format` of a chat.

    Args:
        value: as the client sent it.

    Returns:
        The form, None where the text is free.

    Raises:
        InvalidRequestError: naming the field that breaks a rule.
    """
    fields = _read_object(value, "response_format")
    if fields.get("type") != "json_schema":
        return _read_plain(fields, "response_format")
    chosen = validate(_ChatSchema, fields, "response_format.")
    path = "response_format.json_schema"
    return _to_format(validate(_Schema, without_nulls(chosen.json_schema), f"{path}."), path)


def read_response_format(value: Any) -> AnswerFormat | None:
    """Check the `text.format` of a response; the arguments and the rest are those of `read_chat_format`."""
    fields = _read_object(value, "text.format")
    if fields.get("type") != "json_schema":
        return _read_plain(fields, "text.format")
    del fields["type"]
    return _to_format(validate(_Schema, fields, "text.format."), "text.format")


def _read_object(value: Any, param: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InvalidTypeError(f'{param} must be an object, such as {{"type": "json_object"}}.', param=param)
    return without_nulls(value)


def _read_plain(fields: dict[str, Any], param: str) -> AnswerFormat | None:
    kind = fields.get("type")
    if isinstance(kind, str) and kind not in {"text", "json_object"}:
        raise UnsupportedValueError(
            "The format must be text, json_object or json_schema.", param=f"{param}.type"
        )
    if validate(_Plain, fields, f"{param}.").type == "text":
        return None
    return AnswerFormat({"type": "object"}, f"{param}.type")


def _to_format(schema: _Schema, param: str) -> AnswerFormat:
    return AnswerFormat(schema.schema_, f"{param}.schema")
