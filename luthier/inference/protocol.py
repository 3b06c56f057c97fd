"""What clients may ask of /v1/chat/completions and /v1/completions, checked field by field.

Unknown fields are refused; what real clients send and this server has no use for is named in the two
sets below. Nothing here renders, tokenises or answers.
"""

import json
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from luthier.core.errors import (
    InvalidRequestError,
    InvalidTypeError,
    InvalidValueError,
    LuthierError,
    MissingParameterError,
    UnknownParameterError,
    UnsupportedValueError,
)

# Sent unasked by SDKs and frameworks; they change nothing about a text answer here.
IGNORED_FIELDS = frozenset(
    {
        "user",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "service_tier",
        "store",
        "metadata",
        "parallel_tool_calls",
        "reasoning_effort",
        "verbosity",
        "moderation",
    }
)
# Parts of an earlier answer that clients send back as they got them.
IGNORED_MESSAGE_FIELDS = frozenset({"refusal", "annotations", "audio", "reasoning_content"})

# Fields of OpenAI's API that are accepted only with the values that mean "not used".
_CHAT_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
}
_COMPLETION_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (0, 1),
    "echo": (False,),
    "suffix": ("",),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
}
_MESSAGE_NEUTRAL: dict[str, tuple[Any, ...]] = {"tool_calls": ([],), "function_call": ()}

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_UNSUPPORTED_ROLES = frozenset({"tool", "function"})
_MAX_STOPS = 4
_INT64 = 2**63

RequestT = TypeVar("RequestT", bound="_Request")


class StreamOptions(BaseModel):
    """What a stream carries beside the text. Padding against traffic analysis is not offered."""

    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool = False
    include_obfuscation: bool = False


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: str
    temperature: float = Field(1.0, ge=0.0, le=2.0)
    top_p: float = Field(1.0, ge=0.0, le=1.0)
    seed: int | None = Field(None, ge=-_INT64, lt=_INT64)
    stop: tuple[str, ...] = Field((), max_length=_MAX_STOPS, strict=False)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()


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


class ChatRequest(_Request):
    """A checked chat request; `max_tokens` holds whichever of the two names the client used."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)


class CompletionRequest(_Request):
    """A checked completion request; each prompt is a text or a list of token ids."""

    prompt: list[str | list[int]] = Field(min_length=1, max_length=128)
    max_tokens: int = Field(16, ge=0)
    logprobs: int | None = Field(None, ge=0, le=5)


def parse_chat(body: bytes) -> ChatRequest:
    """Check the body of a chat request.

    Args:
        body: JSON as the client sent it.

    Returns:
        The request, with null fields as if absent and every message's content a text.

    Raises:
        InvalidRequestError: naming the first field that breaks a rule.
    """
    fields = _read_fields(body, _CHAT_NEUTRAL)
    limit = fields.pop("max_completion_tokens", None)
    if limit is not None:
        if fields.get("max_tokens", limit) != limit:
            raise InvalidValueError(
                "max_tokens and max_completion_tokens differ; send one of them.",
                param="max_completion_tokens",
            )
        fields["max_tokens"] = limit
    if "messages" in fields:
        fields["messages"] = _flatten_messages(fields["messages"])
    request = _validate(ChatRequest, fields)
    if request.top_logprobs is not None and not request.logprobs:
        raise InvalidValueError("top_logprobs needs logprobs: true.", param="top_logprobs")
    return request


def parse_completion(body: bytes) -> CompletionRequest:
    """Check the body of a completion request.

    Args:
        body: JSON as the client sent it.

    Returns:
        The request, its prompt a list of texts or of lists of token ids.

    Raises:
        InvalidRequestError: naming the first field that breaks a rule.
    """
    fields = _read_fields(body, _COMPLETION_NEUTRAL)
    prompt = fields.get("prompt")
    if isinstance(prompt, str) or (
        isinstance(prompt, list) and prompt and all(isinstance(item, int) for item in prompt)
    ):
        fields["prompt"] = [prompt]
    return _validate(CompletionRequest, fields)


def _read_fields(body: bytes, neutral: dict[str, tuple[Any, ...]]) -> dict[str, Any]:
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError("The body is not valid JSON.") from error
    if not isinstance(content, dict):
        raise InvalidRequestError("The body must be a JSON object.")
    # JSON null means "unset" on this wire.
    fields = {name: value for name, value in content.items() if value is not None}
    for name in IGNORED_FIELDS & fields.keys():
        del fields[name]
    _refuse_unreadable_text(fields)
    _drop_neutral(fields, neutral)
    if isinstance(fields.get("stop"), str):
        fields["stop"] = [fields["stop"]]
    if isinstance(fields.get("stop"), list):
        # An empty stop text would end every answer at once.
        fields["stop"] = [text for text in fields["stop"] if text != ""]
    if "stream_options" in fields and fields.get("stream") is not True:
        raise InvalidValueError("stream_options is allowed only with stream: true.", param="stream_options")
    return fields


def _refuse_unreadable_text(fields: dict[str, Any]) -> None:
    """Refuse texts that JSON can spell and no tokenizer can take, as training does with its rows.

    It walks with a list of its own: JSON as deep as the parser allows must not exhaust Python's stack.
    """
    remaining: list[tuple[str, Any]] = [("", fields)]
    while remaining:
        param, value = remaining.pop()
        if isinstance(value, str):
            _refuse_unreadable(value, param)
        elif isinstance(value, list):
            remaining.extend((f"{param}.{i}", item) for i, item in enumerate(value))
        elif isinstance(value, dict):
            for name in value:
                # An unreadable name can't be told either; its place is the object that holds it.
                _refuse_unreadable(name, param or None)
            remaining.extend((f"{param}.{name}" if param else name, item) for name, item in value.items())


def _refuse_unreadable(text: str, param: str | None) -> None:
    if "\x00" in text:
        raise InvalidValueError("The text holds a NUL character; remove it.", param=param)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidValueError(
            "The text holds an escape of half a character (a lone surrogate); write the whole pair.",
            param=param,
        ) from None


def _drop_neutral(fields: dict[str, Any], neutral: dict[str, tuple[Any, ...]], prefix: str = "") -> None:
    for name, allowed in neutral.items():
        if name not in fields:
            continue
        value = fields.pop(name)
        if not any(value == item and (type(value) is bool) == (type(item) is bool) for item in allowed):
            raise UnsupportedValueError(
                f"This value of {prefix}{name} is not supported by this server yet; leave the field out.",
                param=prefix + name,
            )


def _flatten_messages(messages: Any) -> Any:
    if not isinstance(messages, list):
        return messages
    return [_flatten_message(message, f"messages.{i}") for i, message in enumerate(messages)]


def _flatten_message(message: Any, param: str) -> Any:
    if not isinstance(message, dict):
        return message
    fields = {name: value for name, value in message.items() if value is not None}
    for name in IGNORED_MESSAGE_FIELDS & fields.keys():
        del fields[name]
    _drop_neutral(fields, _MESSAGE_NEUTRAL, f"{param}.")
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


def _validate(model: type[RequestT], fields: dict[str, Any]) -> RequestT:
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise _to_request_error(error) from error


def _to_request_error(error: ValidationError) -> LuthierError:
    first = error.errors(include_input=False, include_url=False, include_context=False)[0]
    # A union adds the name of its member to the place; clients know field names and positions only.
    place = [str(part) for part in first["loc"] if isinstance(part, int) or str(part).isidentifier()]
    if len(place) > 1 and place[0] == "prompt":
        place = [part for part in place if part not in {"str", "list"}]
    param = ".".join(place)
    kind = first["type"]
    message = f"{param[:120]}: {first['msg']}."
    if kind == "missing":
        return MissingParameterError(message, param=param)
    if kind == "extra_forbidden":
        return UnknownParameterError(f"The field {param[:80]!r} is unknown.", param=param[:80])
    if kind.endswith("_type") or kind.endswith("_parsing"):
        return InvalidTypeError(message, param=param)
    return InvalidValueError(message, param=param)
