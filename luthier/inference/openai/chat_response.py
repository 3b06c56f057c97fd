"""OpenAI's shapes of answers, whole and as stream chunks. Builds values; knows no request and no engine.

Shapes: OpenAI's API reference, "Chat completions" and "Completions (legacy)".
"""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import msgspec

from luthier.core.errors import LuthierError
from luthier.core.ids import IdKind, new_id
from luthier.core.inference import TokenUsage
from luthier.data.rendering.tokenizer import Tokenizer
from luthier.inference.engine.sampler import MIN_LOGPROB
from luthier.inference.engine.sequence import Choice, ChoiceAt
from luthier.inference.models.base_models import ReadyModel
from luthier.inference.openai.chat_request import ChatRequest, CompletionRequest
from luthier.inference.openai.generation import Ended, EndReason, Part, WholeAnswer
from luthier.inference.openai.tool_calls import CallBegun

# A text that stands nowhere else in an event.
_NO_TEXT = "\0text\0"
DONE_EVENT = b"data: [DONE]\n\n"


def encode_json(value: Any) -> bytes:
    """Return compact JSON."""
    return msgspec.json.encode(value)


def encode_event(value: Any) -> bytes:
    """Return a server-sent event that carries a value as JSON."""
    return b"data: " + encode_json(value) + b"\n\n"


def usage(counted: TokenUsage) -> dict[str, Any]:
    """Return the usage object of an answer."""
    return {
        "prompt_tokens": counted.input_tokens,
        "completion_tokens": counted.output_tokens,
        "total_tokens": counted.input_tokens + counted.output_tokens,
        "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


class ResponseFormatter(ABC):
    """How the answers to a request leave, whole or as a stream of events."""

    @abstractmethod
    def whole(self, answers: Sequence[WholeAnswer], counted: TokenUsage) -> dict[str, Any]:
        """Return a whole answer."""

    @abstractmethod
    def first_events(self, num_choices: int) -> list[bytes]:
        """Return the events that come before any text."""

    @abstractmethod
    def part_events(self, part: Part) -> list[bytes]:
        """Return the events of a part."""

    def text_event(self, index: int, text: str) -> bytes:
        """Return the events of a part that is text alone."""
        return b"".join(self.part_events(Part(index, text)))

    @abstractmethod
    def last_events(self, counted: TokenUsage) -> list[bytes]:
        """Return the events after the last part."""

    @abstractmethod
    def error_events(self, error: LuthierError) -> list[bytes]:
        """Return the events of a stream that breaks off."""


class ChoicesFormatter(ResponseFormatter):
    """What answers with choices share; see ChatFormatter, CompletionFormatter."""

    id_kind: ClassVar[IdKind]
    object_name: ClassVar[str]
    chunk_object_name: ClassVar[str]

    def __init__(self, asked: ChatRequest | CompletionRequest, model: str, ready: ReadyModel) -> None:
        self._id, self._created, self._model = new_id(self.id_kind), int(time.time()), model
        self._fingerprint = ready.served.fingerprint
        self._tokenizer = ready.base.tokenizer
        self._with_logprobs = asked.num_logprobs is not None
        # Streams that end with a usage chunk say `usage: null` in all others.
        self._with_usage = asked.stream_options.include_usage
        self._around_texts: dict[int, tuple[bytes, bytes]] = {}

    def whole(self, answers: Sequence[WholeAnswer], counted: TokenUsage) -> dict[str, Any]:
        """Return a whole answer."""
        choices = [self._whole_choice(index, answer) for index, answer in enumerate(answers)]
        return self._frame(self.object_name, choices) | {"usage": usage(counted)}

    def part_events(self, part: Part) -> list[bytes]:
        """Return the event of a part, or of the end of a choice."""
        return [self._event(self._part_choice(part))]

    def text_event(self, index: int, text: str) -> bytes:
        """Return the event of a part that is text alone."""
        if self._with_logprobs:
            return super().text_event(index, text)
        around = self._around_texts.get(index)
        if around is None:
            around = self._around_texts[index] = self._around_text(index)
        before, after = around
        return before + encode_json(text) + after

    def last_events(self, counted: TokenUsage) -> list[bytes]:
        """Return the usage, where it was asked for, and the end of the stream."""
        if not self._with_usage:
            return [DONE_EVENT]
        return [encode_event(self._frame(self.chunk_object_name, []) | {"usage": usage(counted)}), DONE_EVENT]

    def error_events(self, error: LuthierError) -> list[bytes]:
        """Return the event by which SDKs know a failure."""
        return [encode_event(error.to_body())]

    @abstractmethod
    def _whole_choice(self, index: int, answer: WholeAnswer) -> dict[str, Any]:
        """Return a choice of a whole answer."""

    @abstractmethod
    def _part_choice(self, part: Part) -> dict[str, Any]:
        """Return the choice of a chunk."""

    def _around_text(self, index: int) -> tuple[bytes, bytes]:
        """Return what comes before and after a text in its event, which are the same for all of a choice."""
        event = self._event(self._part_choice(Part(index, _NO_TEXT)))
        before, _, after = event.partition(encode_json(_NO_TEXT))
        return before, after

    def _event(self, choice: dict[str, Any]) -> bytes:
        frame = self._frame(self.chunk_object_name, [choice])
        return encode_event(frame | {"usage": None} if self._with_usage else frame)

    def _frame(self, object_name: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": object_name,
            "created": self._created,
            "model": self._model,
            "choices": choices,
            "system_fingerprint": self._fingerprint,
        }


class ChatFormatter(ChoicesFormatter):
    """Answers of /v1/chat/completions."""

    id_kind = "chat_completion"
    object_name = "chat.completion"
    chunk_object_name = "chat.completion.chunk"

    def __init__(self, asked: ChatRequest, model: str, ready: ReadyModel) -> None:
        super().__init__(asked, model, ready)
        # Answers that must call a tool have no content, from their first chunk on.
        self._first_content = None if asked.must_call else ""

    def first_events(self, num_choices: int) -> list[bytes]:
        """Return a chunk per choice that carries its role."""
        delta = {"role": "assistant", "content": self._first_content, "refusal": None}
        return [self._event(_chat_choice(index, delta)) for index in range(num_choices)]

    def _part_choice(self, part: Part) -> dict[str, Any]:
        content = part.content
        if isinstance(content, Ended):
            return _chat_choice(part.index, {}, reason=content.reason)
        logprobs = self._logprobs(part.choices)
        if isinstance(content, str):
            return _chat_choice(part.index, {"content": content}, logprobs)
        if isinstance(content, CallBegun):
            function = {"name": content.name, "arguments": ""}
            call = {"index": content.place, "id": content.id, "type": "function", "function": function}
        else:
            call = {"index": content.place, "function": {"arguments": content.text}}
        return _chat_choice(part.index, {"tool_calls": [call]}, logprobs)

    def _whole_choice(self, index: int, answer: WholeAnswer) -> dict[str, Any]:
        content = answer.text if answer.text or not answer.calls else None
        message: dict[str, Any] = {
            "role": "assistant",
            "content": content,
            "refusal": None,
            "annotations": [],
        }
        if answer.calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in answer.calls
            ]
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(answer.choices),
            "finish_reason": answer.reason,
        }

    def _logprobs(self, choices: Sequence[ChoiceAt]) -> dict[str, Any] | None:
        if not self._with_logprobs:
            return None
        return {"content": token_logprobs(self._tokenizer, choices), "refusal": None}


class CompletionFormatter(ChoicesFormatter):
    """Answers of /v1/completions; chunks have the same object name as whole answers."""

    id_kind = "completion"
    object_name = "text_completion"
    chunk_object_name = "text_completion"

    def first_events(self, num_choices: int) -> list[bytes]:  # noqa: ARG002
        """Return nothing: completions have no role."""
        return []

    def _part_choice(self, part: Part) -> dict[str, Any]:
        content = part.content
        if isinstance(content, Ended):
            return {"index": part.index, "text": "", "logprobs": None, "finish_reason": content.reason}
        assert isinstance(content, str)
        return self._choice(part.index, content, part.choices, None)

    def _whole_choice(self, index: int, answer: WholeAnswer) -> dict[str, Any]:
        return self._choice(index, answer.text, answer.choices, answer.reason)

    def _choice(
        self, index: int, text: str, choices: Sequence[ChoiceAt], reason: EndReason | None
    ) -> dict[str, Any]:
        logprobs = self._logprobs(choices) if self._with_logprobs else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, choices: Sequence[ChoiceAt]) -> dict[str, Any]:
        return {
            "tokens": [self._tokenizer.token_text(held.choice.token_id) for held in choices],
            # A prompt's first token has none.
            "token_logprobs": [
                None if held.choice.logprob is None else _finite(held.choice.logprob) for held in choices
            ],
            "top_logprobs": [self._top(held.choice) for held in choices],
            "text_offset": [held.start for held in choices],
        }

    def _top(self, choice: Choice) -> dict[str, float] | None:
        """Return the likeliest tokens and the chosen one, which need not be among them."""
        if choice.logprob is None:
            return None
        top: dict[str, float] = {}
        for token_id, value in (*choice.top, (choice.token_id, choice.logprob)):
            # Tokens that are parts of a character may look alike; the likeliest stands for them.
            top.setdefault(self._tokenizer.token_text(token_id), _finite(value))
        return top


def token_logprobs(tokenizer: Tokenizer, choices: Sequence[ChoiceAt]) -> list[dict[str, Any]]:
    """Return choices of tokens with their log-probabilities, as chats and responses have them."""

    def item(token_id: int, logprob: float | None) -> dict[str, Any]:
        return {
            "token": tokenizer.token_text(token_id),
            "logprob": _finite(logprob),
            "bytes": list(tokenizer.token_bytes(token_id)),
        }

    return [
        item(held.choice.token_id, held.choice.logprob)
        | {"top_logprobs": [item(token_id, value) for token_id, value in held.choice.top]}
        for held in choices
    ]


def _chat_choice(
    index: int, delta: dict[str, Any], logprobs: Any = None, reason: EndReason | None = None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


def _finite(logprob: float | None) -> float:
    return MIN_LOGPROB if logprob is None or not math.isfinite(logprob) else logprob
