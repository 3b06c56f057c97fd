"""A runner that answers from a table: its next token is a function of the adapter and the tokens so far.

It keeps the tokens themselves in its blocks, as others keep keys and values, so a scheduler that mixes blocks
up gets other answers.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from luthier.modeling.protocols import (
    AdapterId,
    AdapterInfo,
    AdapterSource,
    RunnerLimits,
    ScheduledBatch,
)

VOCAB = 50
BLOCK_SIZE = 4
LIMITS = RunnerLimits(
    dtype="float32",
    vocabulary_size=VOCAB,
    context_length=10**6,
    block_size=BLOCK_SIZE,
    num_blocks=64,
    block_bytes=1,
    max_sequences=8,
    max_prefill_tokens=64,
    max_logit_rows=72,
)


def next_token(adapter: AdapterId | None, history: Sequence[int]) -> int:
    """Return the token that follows; every earlier one counts, and where it is."""
    mixed = sum((i + 1) * token for i, token in enumerate(history))
    return (mixed + 7 * (0 if adapter is None else adapter)) % VOCAB


def expected_answer(adapter: AdapterId | None, prompt: list[int], num_tokens: int) -> list[int]:
    """Return an answer's tokens."""
    history = list(prompt)
    for _ in range(num_tokens):
        history.append(next_token(adapter, history))
    return history[len(prompt) :]


class TableLogits:
    """Logits that are 1 at one token and 0 elsewhere."""

    def __init__(self, tokens: list[int], vocabulary_size: int) -> None:
        self._tokens, self._vocabulary_size = tokens, vocabulary_size

    def greedy(self) -> list[int]:
        return list(self._tokens)

    def draw(self, rows: Sequence[int], **_: Any) -> list[int | None]:
        return [None] * len(rows)

    def rows(self, rows: Sequence[int]) -> torch.Tensor:
        tokens = torch.tensor([self._tokens[row] for row in rows])
        return torch.nn.functional.one_hot(tokens, self._vocabulary_size).float()


class TableRunner:
    """`batches` are the number of sequences of each batch that ran; adapters of `broken` can't run."""

    def __init__(self, limits: RunnerLimits = LIMITS, **changes: Any) -> None:
        self.limits = replace(limits, **changes)
        self.batches: list[int] = []
        self.broken: set[AdapterId | None] = set()
        self.num_threads = 0
        self.is_closed = False
        self._cells = [[0] * self.limits.block_size for _ in range(self.limits.num_blocks)]
        self._num_adapters = 0

    def prepare_adapter(self, source: AdapterSource) -> AdapterSource:
        return source

    def add_adapter(self, source: AdapterSource) -> AdapterInfo:
        self._num_adapters += 1
        return AdapterInfo(self._num_adapters, 0, 1)

    def remove_adapter(self, adapter: AdapterId) -> None:
        pass

    def execute(self, batch: ScheduledBatch, on_launch: Callable[[], None] | None = None) -> TableLogits:
        limits, chunks = self.limits, batch.chunks
        adapters = {chunk.adapter for chunk in chunks}
        assert len(chunks) <= limits.max_sequences
        assert limits.mixes_adapters or len(adapters) == 1
        assert (
            sum(len(one.token_ids) for one in chunks if len(one.token_ids) > 1) <= limits.max_prefill_tokens
        )
        if on_launch is not None:
            on_launch()
        self.batches.append(len(chunks))
        if self.broken & adapters:
            raise RuntimeError("The device is gone.")
        tokens: list[int] = []
        for chunk in chunks:
            for place, token in enumerate(chunk.token_ids):
                position = chunk.first_position + place
                block, cell = divmod(position, limits.block_size)
                self._cells[chunk.block_table[block]][cell] = token
                if place >= chunk.logits_from:
                    cells = [cell for block in chunk.block_table for cell in self._cells[block]]
                    tokens.append(next_token(chunk.adapter, cells[: position + 1]))
        assert len(tokens) <= limits.max_logit_rows
        return TableLogits(tokens, limits.vocabulary_size)

    def discard_blocks(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            self._cells[block] = [0] * self.limits.block_size

    def set_num_threads(self, count: int) -> None:
        self.num_threads = count

    def close(self) -> None:
        self.is_closed = True
