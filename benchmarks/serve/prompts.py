"""Prompts of equal length, each used once in a run: no answer comes from a cache."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from luthier.data.rendering.tokenizer import Tokenizer

_SEED = 20241105


@dataclass(frozen=True)
class Prompt:
    """Token ids, and the text that is exactly these tokens."""

    token_ids: list[int]
    text: str


class Prompts:
    """Ever new prompts cut from a text.

    Every one begins with words drawn for it alone, so that no two share a beginning; what follows is prose,
    on which a model's next words are sure enough for two programs to agree on them.

    Args:
        text: prose.
        tokenizer: the base's.
    """

    def __init__(self, text: str, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._words = text.split()
        self._draw = random.Random(_SEED)

    def take(self, count: int, *, num_tokens: int) -> list[Prompt]:
        """Return the next prompts.

        Args:
            count: how many.
            num_tokens: length of each.

        Returns:
            The prompts; the text of each is its tokens and no others.
        """
        found: list[Prompt] = []
        for prompt in self._candidates(num_tokens):
            found.append(prompt)
            if len(found) == count:
                break
        return found

    def _candidates(self, num_tokens: int) -> Iterator[Prompt]:
        while True:
            start = self._draw.randrange(len(self._words))
            salt = self._draw.choices(self._words, k=3)
            # A word has at least one token.
            words = [self._words[(start + i) % len(self._words)] for i in range(num_tokens)]
            ids = self._tokenizer.encode(" ".join([*salt, *words]))[:num_tokens]
            text = self._tokenizer.decode(ids)
            if len(ids) == num_tokens and self._tokenizer.encode(text) == ids:
                yield Prompt(ids, text)
