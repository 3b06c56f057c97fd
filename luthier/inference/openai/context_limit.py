"""Whether prompts and the answers to them fit: the base's context, and what the server can hold."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from luthier.core.errors import ContextLengthExceededError
from luthier.data.rendering.special_tokens import without_splits
from luthier.inference.models.base_models import ReadyModel


@dataclass(frozen=True)
class Room:
    """Room for one prompt and its answer.

    Args:
        max_cache_tokens: tokens of prompt and answer that the server can hold for one row.
        max_tokens: of the answer, None where the request names no number.
    """

    ready: ReadyModel
    max_cache_tokens: int
    max_tokens: int | None
    param: str

    def encode(self, text: str) -> list[int]:
        """Tokenise a rendered prompt that fits.

        Args:
            text: the prompt. One whose length tells that it can't fit is refused before it is tokenised,
                which takes seconds for megabytes.

        Raises:
            ContextLengthExceededError: when it does not fit.
        """
        return self._encode(text, self.ready.base.tokenizer.encode)

    def encode_raw(self, text: str) -> list[int]:
        """Do as `encode` for a prompt without a template."""
        return self._encode(text, self.ready.base.tokenizer.encode_raw)

    def _encode(self, text: str, encode: Callable[[str], list[int]]) -> list[int]:
        base = self.ready.base
        # No token without a byte: a shorter text needs no further look.
        if len(text) > self._limit and base.token_bounds is not None:
            self._check(base.token_bounds.min_num_tokens(without_splits(text)), "at least ")
        token_ids = encode(text)
        self.check(token_ids)
        return token_ids

    def check(self, token_ids: Sequence[int]) -> None:
        """Refuse a prompt that does not fit.

        Raises:
            ContextLengthExceededError: when it does not fit.
        """
        self._check(len(token_ids), "")

    def answer_length(self, token_ids: Sequence[int], default: int) -> int:
        """Return how many tokens an answer may have.

        Args:
            default: where the request names no number; less where that does not fit.
        """
        if self.max_tokens is not None:
            return self.max_tokens
        return min(default, self._limit - len(token_ids))

    @cached_property
    def _limit(self) -> int:
        context = self.ready.base.facts.context_length
        return min(context, self.max_cache_tokens) - self.ready.num_virtual_tokens

    def _check(self, length: int, how: str) -> None:
        # An answer of unnamed length needs room for a single token only.
        wanted = 1 if self.max_tokens is None else self.max_tokens
        if length + wanted <= self._limit:
            return
        num_virtual = self.ready.num_virtual_tokens
        is_context = self.ready.base.facts.context_length <= self.max_cache_tokens
        whose = "This model's context is" if is_context else "This server's memory for one answer is"
        beside = f" beside the model's own {num_virtual}" if num_virtual else ""
        # A smaller answer helps only a prompt that fits by itself.
        is_prompt = length + 1 > self._limit
        answer = "" if is_prompt else f" and the answer was given {wanted}"
        advice = "Shorten the prompt" if is_prompt else "Shorten the prompt or lower max_tokens"
        raise ContextLengthExceededError(
            f"{whose} {self._limit} tokens{beside}; the prompt has {how}{length}{answer}. {advice}.",
            param=self.param,
        )
