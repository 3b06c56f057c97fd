"""Requests as vLLM takes them, and its answers as this service gives them. No connections.

vLLM ignores fields that it does not know, so they are refused here. Nothing that it would read from a base's
`generation_config.json` decides: what a client leaves out is what OpenAI's API documents.
"""

import json
import re
from collections.abc import AsyncIterator, Mapping
from typing import Any, NamedTuple

from httpx2 import ServerSentEvent

from luthier.core.errors import (
    ContextLengthExceededError,
    InvalidRequestError,
    InvalidValueError,
    LuthierError,
    TooManyRequestsError,
    UnavailableError,
    UnknownParameterError,
    UnsupportedValueError,
)
from luthier.core.inference import TokenUsage
from luthier.inference.openai.fields import IGNORED_FIELDS, drop_neutral, read_object
from luthier.serving.base import Health

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"

_SHARED = frozenset(
    {
        "n",
        "temperature",
        "top_p",
        "seed",
        "stop",
        "presence_penalty",
        "frequency_penalty",
        "logit_bias",
        "stream",
        "stream_options",
        "max_tokens",
        "logprobs",
    }
)
_PASSED = {
    CHAT: _SHARED
    | {
        "messages",
        "max_completion_tokens",
        "top_logprobs",
        "response_format",
        "tools",
        "tool_choice",
        "parallel_tool_calls",
    },
    COMPLETIONS: _SHARED | {"prompt", "echo"},
}
# Accepted only with the values that mean "not used".
_NEUTRAL: dict[str, dict[str, tuple[Any, ...]]] = {
    CHAT: {
        "functions": ([],),
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "web_search_options": (),
    },
    COMPLETIONS: {"suffix": ("",), "best_of": (0, 1)},
}
# vLLM takes these from the base's own files where a request has none.
_DEFAULTS = {"temperature": 1.0, "top_p": 1.0}
_OURS = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
_ANSWER_FIELDS = ("id", "object", "created", "model", "choices", "usage")
_CHOICE_FIELDS = ("index", "message", "delta", "text", "logprobs", "finish_reason")
_MESSAGE_FIELDS = ("role", "content", "refusal", "tool_calls")
_MAX_MESSAGE_CHARS = 300


def read_request(path: str, body: bytes, *, max_tokens_default: int) -> dict[str, Any]:
    """Check which fields a request has; vLLM checks their values.

    Args:
        path: where the client sent it.
        body: JSON as the client sent it.
        max_tokens_default: length of a chat's answer when the client names none.

    Raises:
        InvalidRequestError: naming the first field that breaks a rule.
        UnsupportedValueError: for an endpoint that is not offered.
    """
    if path not in _PASSED:
        raise UnsupportedValueError(
            f"This server answers {CHAT} and {COMPLETIONS} alone. An operator offers {path} by the backend "
            "engine (LUTHIER_INFERENCE_BACKEND)."
        )
    fields = read_object(body, IGNORED_FIELDS)
    drop_neutral(fields, _NEUTRAL[path])
    fields.pop("model", None)
    unknown = sorted(fields.keys() - _PASSED[path])
    if unknown:
        name = unknown[0][:80]
        raise UnknownParameterError(f"Unknown parameter: '{name}'. Leave it out.", param=name)
    if "stream_options" in fields:
        fields["stream_options"] = _read_stream_options(fields)
    if path == CHAT and not {"max_tokens", "max_completion_tokens"} & fields.keys():
        fields["max_tokens"] = max_tokens_default
    return {**_DEFAULTS, **fields, **_OURS}


def _read_stream_options(fields: dict[str, Any]) -> dict[str, Any]:
    options = fields["stream_options"]
    if fields.get("stream") is not True or not isinstance(options, dict):
        raise InvalidValueError(
            "stream_options is allowed only with stream: true, and is an object.", param="stream_options"
        )
    drop_neutral(options, {"include_obfuscation": (False,)}, "stream_options.")
    unknown = sorted(options.keys() - {"include_usage"})
    if unknown:
        name = f"stream_options.{unknown[0][:80]}"
        raise UnknownParameterError(f"Unknown parameter: '{name}'. Leave it out.", param=name)
    return options


class Renaming:
    """Turn vLLM's answers into this service's.

    Args:
        digest: of what answers; None where it is not known.
        shows_usage: whether a stream's client asked for its usage, for which vLLM is asked in any case.
    """

    def __init__(self, model: str, digest: str | None, *, shows_usage: bool) -> None:
        self._model = model
        self._shows_usage = shows_usage
        self.used = TokenUsage(0, 0, 0)
        self._fingerprint = None if digest is None else digest.removeprefix("sha256:")[:12]

    def whole(self, content: bytes) -> bytes:
        """Return a whole answer, or a stream's chunk, under the public name and with OpenAI's fields alone.

        Raises:
            LuthierError: when it reports a failure, or is no JSON.
        """
        try:
            answer = json.loads(content)
            if "error" in answer:
                raise read_error(500, content)
            answered = {name: answer[name] for name in _ANSWER_FIELDS if name in answer}
            answered["choices"] = [_trim(choice) for choice in answer["choices"]]
            if answered.get("usage") is not None:
                self.used = _read_usage(answered["usage"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise LuthierError("The model server's answer could not be read.") from error
        answered |= {"model": self._model, "system_fingerprint": self._fingerprint}
        return json.dumps(answered, ensure_ascii=False, separators=(",", ":")).encode()

    async def events(self, events: AsyncIterator[ServerSentEvent]) -> AsyncIterator[bytes]:
        """Yield a stream's events under the public name; a failure that vLLM sends is one of ours."""
        async for event in events:
            if event.data == "[DONE]":
                yield self.used.to_event() + b"data: [DONE]\n\n"
                continue
            try:
                content = self.whole(event.data.encode())
                if not self._shows_usage and _is_usage_alone(content):
                    continue
            except LuthierError as error:
                content = json.dumps(error.to_body()).encode()
            yield b"data: " + content + b"\n\n"


def _read_usage(usage: Any) -> TokenUsage:
    details = usage.get("prompt_tokens_details") or {}
    return TokenUsage(
        usage.get("prompt_tokens") or 0,
        details.get("cached_tokens") or 0,
        usage.get("completion_tokens") or 0,
    )


def _is_usage_alone(content: bytes) -> bool:
    return b'"choices":[]' in content


def _trim(choice: Mapping[str, Any]) -> dict[str, Any]:
    answered = {name: choice[name] for name in _CHOICE_FIELDS if name in choice}
    for part in ("message", "delta"):
        if part in answered:
            message = {name: answered[part][name] for name in _MESSAGE_FIELDS if name in answered[part]}
            if not message.get("tool_calls"):
                message.pop("tool_calls", None)
            answered[part] = message
    return answered


def read_error(status: int, content: bytes) -> LuthierError:
    """Return vLLM's refusal as one of ours."""
    try:
        answered = json.loads(content)["error"]
        message, param = str(answered["message"])[:_MAX_MESSAGE_CHARS], answered.get("param")
        status = int(answered.get("code", status))
    except (ValueError, KeyError, TypeError, AttributeError):
        message, param = "it gave no reason.", None
    if "context length" in message:
        return ContextLengthExceededError(message, param=param if isinstance(param, str) else None)
    if status in {400, 422}:
        return InvalidRequestError(message, param=param if isinstance(param, str) else None)
    if status in {401, 403}:
        return LuthierError(
            "vLLM refuses this service's token. An operator starts it with LUTHIER_INTERNAL_TOKEN as its "
            "--api-key."
        )
    if status == TooManyRequestsError.http_status:
        return TooManyRequestsError("Too many requests are waiting for the model server; try again.")
    if status in {404, UnavailableError.http_status}:
        return UnavailableError("The model server can't answer for this model right now; try again.")
    return LuthierError("The model server failed on this request; the operator's log of vLLM says why.")


_OUR_NAME = re.compile(r"luthier-([0-9a-f]{64})")
_GAUGE = re.compile(rb"^vllm:num_requests_(running|waiting)(?:\{[^}]*\})? ([0-9.e+]+)$", re.MULTILINE)


class Served(NamedTuple):
    """The names that a server answers to: its base's or whole model's own, and those of adapters of ours."""

    bases: frozenset[str]
    adapters: frozenset[str]


def served_name(digest: str) -> str:
    """Return the name that an artifact has in vLLM, of an adapter and of a whole model alike."""
    return f"luthier-{digest.removeprefix('sha256:')}"


def read_models(content: bytes) -> Served:
    """Read what GET /v1/models answers.

    Raises:
        UnavailableError: when it is no list of models.
    """
    try:
        cards = [(str(card["id"]), card.get("parent")) for card in json.loads(content)["data"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnavailableError("What answers in vLLM's place does not list its models.") from error
    adapters = {name for name, parent in cards if parent is not None and _OUR_NAME.fullmatch(name)}
    return Served(frozenset(name for name, parent in cards if parent is None), frozenset(adapters))


def read_health(served: Served, metrics: bytes) -> Health:
    """Put together how a server is.

    Args:
        metrics: what GET /metrics answers; what is not there counts as none.
    """
    counts = {b"running": 0, b"waiting": 0}
    for kind, value in _GAUGE.findall(metrics):
        counts[kind] += int(float(value))
    bases = frozenset(map(_digest_or_name, served.bases))
    holds = bases | frozenset(map(_digest_or_name, served.adapters))
    return Health(True, holds, counts[b"running"], counts[b"waiting"], serves=bases)


def _digest_or_name(name: str) -> str:
    ours = _OUR_NAME.fullmatch(name)
    return name if ours is None else f"sha256:{ours[1]}"
