"""What clients may ask of /v1/chat/completions and /v1/completions, checked field by field.

Unknown fields are refused; what real clients send and this server has no use for is named in `fields` and
in the sets below. Messages are flattened to what a template takes. Nothing here renders, tokenises or
answers.
"""

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from luthier.core.errors import (
    InvalidTypeError,
    InvalidValueError,
    MissingParameterError,
    UnsupportedValueError,
)
from luthier.data.json_values import MAX_VALUES, max_num_values
from luthier.inference.openai.fields import (
    IGNORED_FIELDS,
    drop_ignored,
    drop_neutral,
    load,
    read_object,
    validate,
    without_nulls,
)
from luthier.inference.openai.structured_output import AnswerFormat, read_format
from luthier.inference.openai.tools import TOOL_FIELDS, Tools, read_tools

# Fields of OpenAI's API that are accepted only with the values that mean "not used".
_CHAT_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
}
_COMPLETION_NEUTRAL: dict[str, tuple[Any, ...]] = {"suffix": ("",)}

MAX_MESSAGES = 4096
_MAX_STOPS = 4
_MAX_BIASES = 1024
_MAX_BIAS = 100.0
# Answers of one request, over all its prompts.
_MAX_CHOICES = 128
_INT64 = 2**63
# The first fault is all that is reported: others are not collected.
TokenIds = Annotated[list[int], Field(fail_fast=True)]

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


class StreamOptions(BaseModel):
    """What a stream carries beside the text. Padding against traffic analysis is not offered."""

    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool = False
    include_obfuscation: bool = False


class SamplingRequest(BaseModel):
    """What every endpoint may ask about how tokens are chosen and sent."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: str
    n: int = Field(1, ge=1, le=_MAX_CHOICES)
    temperature: float = Field(1.0, ge=0.0, le=2.0)
    top_p: float = Field(1.0, ge=0.0, le=1.0)
    seed: int | None = Field(None, ge=-_INT64, lt=_INT64)
    stop: tuple[str, ...] = Field((), max_length=_MAX_STOPS, strict=False, fail_fast=True)
    presence_penalty: float = Field(0.0, ge=-2.0, le=2.0)
    frequency_penalty: float = Field(0.0, ge=-2.0, le=2.0)
    logit_bias: tuple[tuple[int, float], ...] = ()
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()


class ChatRequest(SamplingRequest):
    """A checked chat request; `max_tokens` holds whichever of the two names the client used."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    max_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: AnswerFormat | None = None
    tools: Tools | None = None

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives to report for each token; None for no log-probabilities at all."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def must_call(self) -> bool:
        """Whether answers are calls of tools and nothing else."""
        return self.tools is not None and self.tools.mode == "required"

    @property
    def has_schema(self) -> bool:
        """Whether answers may be held to a schema, which has to be compiled."""
        if self.response_format is not None or self.tools is None:
            return self.response_format is not None
        return self.must_call or any(tool.is_strict for tool in self.tools.callable)


class CompletionRequest(SamplingRequest):
    """A checked completion request; each prompt is a text or a list of token ids."""

    prompt: list[str | TokenIds] = Field(min_length=1, max_length=_MAX_CHOICES, fail_fast=True)
    max_tokens: int = Field(16, ge=0)
    logprobs: int | None = Field(None, ge=0, le=5)
    best_of: int | None = Field(None, ge=0, le=20)
    echo: bool = False

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives to report for each token; None for no log-probabilities at all."""
        return self.logprobs


def parse_chat(body: bytes) -> ChatRequest:
    """Check the body of a chat request.

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
    if "response_format" in fields:
        given = fields["response_format"]
        fields["response_format"] = read_format(given, "response_format", is_nested=True)
    if fields.keys() & TOOL_FIELDS and (tools := read_tools(fields)).tools:
        fields["tools"] = tools
    if "messages" in fields:
        fields["messages"] = flatten_messages(fields["messages"])
    request = validate(ChatRequest, fields)
    if request.top_logprobs is not None and not request.logprobs:
        raise InvalidValueError("top_logprobs needs logprobs: true.", param="top_logprobs")
    check_arguments(request.messages, "messages")
    return request


def parse_completion(body: bytes) -> CompletionRequest:
    """Check the body of a completion request.

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
    request = validate(CompletionRequest, fields)
    if request.n * len(request.prompt) > _MAX_CHOICES:
        raise InvalidValueError(
            f"n times the number of prompts may be {_MAX_CHOICES} at most; send several requests.", param="n"
        )
    if request.best_of not in {None, 0, request.n}:
        raise UnsupportedValueError(
            "best_of other than n is not supported by this server; ask for n answers with logprobs and "
            "choose among them.",
            param="best_of",
        )
    return request


def _read_fields(body: bytes, neutral: dict[str, tuple[Any, ...]]) -> dict[str, Any]:
    fields = read_object(body, IGNORED_FIELDS)
    drop_neutral(fields, neutral)
    if isinstance(fields.get("stop"), str):
        fields["stop"] = [fields["stop"]]
    if isinstance(fields.get("stop"), list):
        # An empty stop text would end every answer at once.
        fields["stop"] = [text for text in fields["stop"] if text != ""]
    if "logit_bias" in fields:
        fields["logit_bias"] = _read_logit_bias(fields["logit_bias"])
    if "stream_options" in fields and fields.get("stream") is not True:
        raise InvalidValueError("stream_options is allowed only with stream: true.", param="stream_options")
    return fields


def _read_logit_bias(value: Any) -> tuple[tuple[int, float], ...]:
    """Return the pairs of a map from token ids, as JSON's keys, to numbers from -100 to 100."""
    if not isinstance(value, dict):
        raise InvalidTypeError(
            'logit_bias must be an object from token ids to numbers, such as {"1734": -100}.',
            param="logit_bias",
        )
    if len(value) > _MAX_BIASES:
        raise InvalidValueError(f"logit_bias may have {_MAX_BIASES} tokens at most.", param="logit_bias")
    pairs = []
    for key, bias in value.items():
        if not (key.isascii() and key.isdecimal() and len(key) < 10):
            raise InvalidValueError("The keys of logit_bias must be token ids.", param="logit_bias")
        param = f"logit_bias.{int(key)}"
        if isinstance(bias, bool) or not isinstance(bias, int | float):
            raise InvalidTypeError("A bias must be a number.", param=param)
        if not math.isfinite(bias) or abs(bias) > _MAX_BIAS:
            raise InvalidValueError("A bias must be from -100 to 100.", param=param)
        pairs.append((int(key), float(bias)))
    return tuple(pairs)


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
