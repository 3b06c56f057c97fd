"""Answers of models in OpenAI's shapes; documented here, built by the inference server."""

from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

# The content type of an operation that may stream.
EVENT_STREAM: dict[str, Any] = {"text/event-stream": {"schema": {"type": "string"}}}


class UsageObject(TypedDict):
    """Tokens of an answer."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: NotRequired[dict[str, int]]
    completion_tokens_details: NotRequired[dict[str, int]]


class ChatCompletion(TypedDict):
    """A whole answer to a chat; `choices` as OpenAI documents them."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[dict[str, Any]]
    usage: UsageObject
    system_fingerprint: str | None


class Completion(TypedDict):
    """A whole continuation of a text; `choices` as OpenAI documents them."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[dict[str, Any]]
    usage: UsageObject
    system_fingerprint: str | None


class ResponseObject(TypedDict):
    """A whole response; the members that are not listed are as OpenAI documents them."""

    id: str
    object: Literal["response"]
    created_at: int
    model: str
    status: str
    output: list[dict[str, Any]]
    usage: dict[str, Any]
