"""What clients may ask of /v1/responses: a chat in other words. Checked here, then a ChatRequest like any.

Nothing is kept between requests, so what leans on an earlier response is refused.
"""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from luthier.core.errors import (
    InvalidTypeError,
    InvalidValueError,
    MissingParameterError,
    UnsupportedValueError,
)
from luthier.inference.openai.chat_request import (
    MAX_MESSAGES,
    ChatMessage,
    ChatRequest,
    StreamOptions,
    check_arguments,
    flatten_message,
)
from luthier.inference.openai.fields import (
    IGNORED_FIELDS,
    drop_neutral,
    read_object,
    validate,
    without_nulls,
)
from luthier.inference.openai.structured_output import AnswerFormat, read_format
from luthier.inference.openai.tools import Tools, read_tools

_IGNORED = (IGNORED_FIELDS - {"metadata"}) | {
    "reasoning",
    "max_tool_calls",
    "access_programs",
    "background_options",
    "image",
}
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "background": (False,),
    "truncation": ("disabled",),
    "prompt": (),
    "context_management": ([],),
}
# What rests on responses that a server has kept; this one keeps none.
_KEPT = ("previous_response_id", "conversation")
_MAX_INCLUDED = 16
_LOGPROBS = "message.output_text.logprobs"
_TEXT_PARTS = frozenset({"input_text", "output_text", "text"})
# Of items that were another response's output.
_IGNORED_ITEM_FIELDS = frozenset({"id", "status", "phase", "type"})


class _Fields(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    model: str
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0.0, le=2.0)
    top_p: float = Field(1.0, ge=0.0, le=1.0)
    top_logprobs: int | None = Field(None, ge=0, le=20)
    include: list[str] = Field([], max_length=_MAX_INCLUDED)
    metadata: dict[str, str] = {}
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()


class ResponseRequest(ChatRequest):
    """A checked request: a chat, and what its answer repeats of it."""

    echo: dict[str, Any]


def parse_response(body: bytes) -> ResponseRequest:
    """Check the body of a request for a response.

    Returns:
        The request, with null fields as if absent.

    Raises:
        InvalidRequestError: naming the first field that breaks a rule.
    """
    fields = read_object(body, _IGNORED)
    drop_neutral(fields, _NEUTRAL)
    for name in _KEPT:
        if name in fields:
            raise UnsupportedValueError(
                f"{name} is not supported: this server keeps no responses. Send the conversation so far as "
                "input, the items of earlier outputs included.",
                param=name,
            )
    if "input" not in fields:
        raise MissingParameterError("Missing required parameter: 'input'.", param="input")
    given = fields.pop("input")
    echoed = {name: fields.get(name) for name in ("tools", "tool_choice")}
    tools = read_tools(fields, is_nested=False)
    answer, text = _read_text(fields.pop("text", {}))
    checked = validate(_Fields, fields)
    messages = _read_input(given)
    if checked.instructions is not None:
        messages.insert(0, ChatMessage(role="system", content=checked.instructions))
    with_logprobs = checked.top_logprobs is not None
    for i, item in enumerate(checked.include):
        if item != _LOGPROBS:
            raise UnsupportedValueError(f"Only {_LOGPROBS} can be included.", param=f"include.{i}")
        with_logprobs = True
    return ResponseRequest(
        model=checked.model,
        messages=messages,
        max_tokens=checked.max_output_tokens,
        temperature=checked.temperature,
        top_p=checked.top_p,
        logprobs=with_logprobs,
        top_logprobs=checked.top_logprobs,
        response_format=answer,
        tools=tools,
        stream=checked.stream,
        echo=_echo(checked, tools, echoed, text),
    )


def _echo(checked: _Fields, tools: Tools, given: dict[str, Any], text: dict[str, Any]) -> dict[str, Any]:
    return {
        "instructions": checked.instructions,
        "max_output_tokens": checked.max_output_tokens,
        "metadata": checked.metadata,
        "parallel_tool_calls": tools.is_parallel,
        "temperature": checked.temperature,
        "text": {"format": text},
        "tool_choice": given["tool_choice"] or "auto",
        "tools": [
            {"parameters": None, "strict": tool.is_strict} | item
            for tool, item in zip(tools.tools, given["tools"] or [], strict=True)
        ],
        "top_logprobs": checked.top_logprobs or 0,
        "top_p": checked.top_p,
    }


def _read_text(text: Any) -> tuple[AnswerFormat | None, dict[str, Any]]:
    if not isinstance(text, dict):
        raise InvalidTypeError("text must be an object.", param="text")
    fields = without_nulls(text)
    given = fields.pop("format", {"type": "text"})
    fields.pop("verbosity", None)
    if fields:
        raise InvalidValueError("text has format and verbosity.", param=f"text.{next(iter(fields))[:40]}")
    return read_format(given, "text.format", is_nested=False), without_nulls(given)


def _read_input(given: Any) -> list[ChatMessage]:
    """Return the messages of an input: a text is a user's, calls in a row belong to one message."""
    if isinstance(given, str):
        return [ChatMessage(role="user", content=given)]
    if not isinstance(given, list) or not given:
        raise InvalidTypeError("input must be a text, or a list with at least one item.", param="input")
    if len(given) > MAX_MESSAGES:
        raise InvalidValueError(f"input may have {MAX_MESSAGES} items at most.", param="input")
    messages: list[ChatMessage] = []
    is_open = False
    for i, item in enumerate(given):
        param = f"input.{i}"
        message = validate(ChatMessage, flatten_message(_to_message(item, param), param), f"{param}.")
        if message.tool_calls and is_open:
            messages[-1].tool_calls.extend(message.tool_calls)
        else:
            messages.append(message)
        is_open = message.role == "assistant"
    check_arguments(messages, "input")
    return messages


def _to_message(item: Any, param: str) -> dict[str, Any]:
    """Return an item as a chat's message, whose fields are still to be checked."""
    if not isinstance(item, dict):
        raise InvalidTypeError("An item of the input must be an object.", param=param)
    kind = item.get("type", "message")
    fields = {name: value for name, value in item.items() if name not in _IGNORED_ITEM_FIELDS}
    if kind == "message":
        return fields | {"content": _read_content(fields.get("content"), f"{param}.content")}
    if kind == "function_call":
        call: dict[str, Any] = {"id": _take(fields, "call_id", param), "type": "function"}
        call["function"] = {name: _take(fields, name, param) for name in ("name", "arguments")}
        return {"role": "assistant", "tool_calls": [call]}
    if kind == "function_call_output":
        content = _read_content(fields.get("output"), f"{param}.output")
        return {"role": "tool", "tool_call_id": _take(fields, "call_id", param), "content": content}
    raise UnsupportedValueError(
        "Items of this type are not supported; send messages, function_call and function_call_output.",
        param=f"{param}.type",
    )


def _take(fields: dict[str, Any], name: str, param: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str):
        raise InvalidTypeError(f"{name} must be a string.", param=f"{param}.{name}")
    return value


def _read_content(content: Any, param: str) -> Any:
    """Return a content with its parts as a chat has them."""
    if not isinstance(content, list):
        return content
    parts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind not in _TEXT_PARTS:
            raise UnsupportedValueError("Only text is supported by this server.", param=f"{param}.{i}.type")
        parts.append({"type": "text", "text": part.get("text")} if isinstance(part, dict) else part)
    return parts
