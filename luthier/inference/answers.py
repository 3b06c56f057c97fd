"""OpenAI's shapes of answers, whole and as stream chunks. Builds values; knows no request and no engine.

Shapes: OpenAI's API reference, "Chat completions" and "Completions (legacy)".
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from luthier.data.tokens import Tokenizer
from luthier.inference.sampler import MIN_LOGPROB
from luthier.inference.sequence import ChoiceAt, FinishReason, Piece

DONE_EVENT = b"data: [DONE]\n\n"


def encode_json(value: Any) -> bytes:
    """Return compact JSON."""
    return msgspec.json.encode(value)


def encode_event(value: Any) -> bytes:
    """Return a server-sent event that carries a value as JSON."""
    return b"data: " + encode_json(value) + b"\n\n"


def usage(num_prompt_tokens: int, num_completion_tokens: int) -> dict[str, Any]:
    """Return the usage object of an answer."""
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_completion_tokens,
        "total_tokens": num_prompt_tokens + num_completion_tokens,
        "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


@dataclass(frozen=True)
class Shape(ABC):
    """What all parts of one answer share, and how a choice looks in it; see ChatShape, CompletionShape."""

    id: str
    created: int
    model: str
    fingerprint: str
    tokenizer: Tokenizer
    with_logprobs: bool
    # Streams that end with a usage chunk say `usage: null` in all others.
    with_usage: bool

    object_name = ""
    chunk_object_name = ""

    def whole(self, choices: list[dict[str, Any]], usage_object: dict[str, Any]) -> dict[str, Any]:
        """Return a whole answer."""
        return self._frame(self.object_name, choices) | {"usage": usage_object}

    def usage_chunk(self, usage_object: dict[str, Any]) -> dict[str, Any]:
        """Return the last chunk of a stream that was asked for its usage."""
        return self._frame(self.chunk_object_name, []) | {"usage": usage_object}

    @abstractmethod
    def first_chunks(self, num_choices: int) -> list[dict[str, Any]]:
        """Return the chunks that come before any text."""

    @abstractmethod
    def piece_chunk(self, index: int, piece: Piece) -> dict[str, Any]:
        """Return the chunk of a piece of text."""

    @abstractmethod
    def finish_chunk(self, index: int, reason: FinishReason) -> dict[str, Any]:
        """Return the chunk that ends a choice."""

    @abstractmethod
    def choice(
        self, index: int, text: str, choices: Sequence[ChoiceAt], reason: FinishReason
    ) -> dict[str, Any]:
        """Return a choice of a whole answer."""

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        frame = self._frame(self.chunk_object_name, [choice])
        return frame | {"usage": None} if self.with_usage else frame

    def _frame(self, object_name: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": object_name,
            "created": self.created,
            "model": self.model,
            "choices": choices,
            "system_fingerprint": self.fingerprint,
        }


class ChatShape(Shape):
    """Answers of /v1/chat/completions."""

    object_name = "chat.completion"
    chunk_object_name = "chat.completion.chunk"

    def first_chunks(self, num_choices: int) -> list[dict[str, Any]]:
        """Return a chunk per choice that carries its role."""
        delta = {"role": "assistant", "content": "", "refusal": None}
        return [self._chunk(_chat_choice(index, delta)) for index in range(num_choices)]

    def piece_chunk(self, index: int, piece: Piece) -> dict[str, Any]:
        """Return the chunk of a piece of text."""
        logprobs = self._logprobs(piece.choices) if self.with_logprobs else None
        return self._chunk(_chat_choice(index, {"content": piece.text}, logprobs))

    def finish_chunk(self, index: int, reason: FinishReason) -> dict[str, Any]:
        """Return the chunk with an empty delta that ends a choice."""
        return self._chunk(_chat_choice(index, {}, reason=reason))

    def choice(
        self, index: int, text: str, choices: Sequence[ChoiceAt], reason: FinishReason
    ) -> dict[str, Any]:
        """Return a choice with its message."""
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None, "annotations": []}
        logprobs = self._logprobs(choices) if self.with_logprobs else None
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, choices: Sequence[ChoiceAt]) -> dict[str, Any]:
        content = []
        for held in choices:
            item = self._token(held.choice.token_id, held.choice.logprob)
            item["top_logprobs"] = [self._token(token_id, value) for token_id, value in held.choice.top]
            content.append(item)
        return {"content": content, "refusal": None}

    def _token(self, token_id: int, logprob: float | None) -> dict[str, Any]:
        return {
            "token": self.tokenizer.token_text(token_id),
            "logprob": _finite(logprob),
            "bytes": list(self.tokenizer.token_bytes(token_id)),
        }


class CompletionShape(Shape):
    """Answers of /v1/completions; chunks bear the same object name as whole answers."""

    object_name = "text_completion"
    chunk_object_name = "text_completion"

    def first_chunks(self, num_choices: int) -> list[dict[str, Any]]:  # noqa: ARG002
        """Return nothing: completions have no role."""
        return []

    def piece_chunk(self, index: int, piece: Piece) -> dict[str, Any]:
        """Return the chunk of a piece of text."""
        return self._chunk(self._choice(index, piece.text, piece.choices, None))

    def finish_chunk(self, index: int, reason: FinishReason) -> dict[str, Any]:
        """Return the chunk with an empty text that ends a choice."""
        return self._chunk({"index": index, "text": "", "logprobs": None, "finish_reason": reason})

    def choice(
        self, index: int, text: str, choices: Sequence[ChoiceAt], reason: FinishReason
    ) -> dict[str, Any]:
        """Return a choice with its text."""
        return self._choice(index, text, choices, reason)

    def _choice(
        self, index: int, text: str, choices: Sequence[ChoiceAt], reason: FinishReason | None
    ) -> dict[str, Any]:
        logprobs = self._logprobs(choices) if self.with_logprobs else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, choices: Sequence[ChoiceAt]) -> dict[str, Any]:
        text = self.tokenizer.token_text
        return {
            "tokens": [text(held.choice.token_id) for held in choices],
            "token_logprobs": [_finite(held.choice.logprob) for held in choices],
            # The chosen token is always among them, though it need not be one of the likeliest.
            "top_logprobs": [
                {
                    text(token_id): _finite(value)
                    for token_id, value in ((held.choice.token_id, held.choice.logprob), *held.choice.top)
                }
                for held in choices
            ],
            "text_offset": [held.start for held in choices],
        }


def _chat_choice(
    index: int, delta: dict[str, Any], logprobs: Any = None, reason: FinishReason | None = None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


def _finite(logprob: float | None) -> float:
    return MIN_LOGPROB if logprob is None or not math.isfinite(logprob) else logprob
