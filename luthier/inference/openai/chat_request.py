"""What clients may ask of /v1/chat/completions and /v1/completions, checked field by field.

Unknown fields are refused; what real clients send and this server has no use for is named in `fields` and
in the sets below. Nothing here renders, tokenises or answers.
"""

import math
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from luthier.core.errors import InvalidTypeError, InvalidValueError, UnsupportedValueError
from luthier.inference.openai.fields import IGNORED_FIELDS, drop_neutral, read_object, validate
from luthier.inference.openai.messages import ChatMessage, check_arguments, flatten_messages
from luthier.inference.openai.structured_output import AnswerFormat, read_chat_format
from luthier.inference.openai.tools import Tools, read_chat_tools

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
    tools: Tools = Tools()

    @property
    def has_schema(self) -> bool:
        """Whether answers may be held to a schema, which has to be compiled."""
        must_call = self.tools.mode == "required"
        return self.response_format is not None or must_call or any(t.is_strict for t in self.tools.callable)


class CompletionRequest(SamplingRequest):
    """A checked completion request; each prompt is a text or a list of token ids."""

    prompt: list[str | TokenIds] = Field(min_length=1, max_length=_MAX_CHOICES, fail_fast=True)
    max_tokens: int = Field(16, ge=0)
    logprobs: int | None = Field(None, ge=0, le=5)
    best_of: int | None = Field(None, ge=0, le=20)
    echo: bool = False


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
        fields["response_format"] = read_chat_format(fields["response_format"])
    fields["tools"] = read_chat_tools(fields)
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
