"""Verification of models on a runner: their logits after short texts, by the ways that requests go.

Runs between two steps of the engine. Never the checks themselves (proofs.py).

Legend: `V` vocabulary, `B` the first tokens of a text.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from luthier.core.errors import ArtifactCorruptError
from luthier.core.specs import Canary
from luthier.inference.engine.step import BatchExecutor
from luthier.inference.verification.checks import (
    CANARY_TOLERANCE,
    check_canary,
    check_finite_logits,
    check_probe,
    check_row,
    gap_between,
)
from luthier.modeling.protocols import AdapterInfo, ScheduledBatch, TokenChunk

# Of a text that training recorded; it takes four, and took up to sixteen.
_MAX_CANARY_TOKENS = 64
# Of fewer tokens none is left for a chunk of one token behind a longer one.
_LEAST_TOKENS = 3


@dataclass(frozen=True)
class Text:
    """A text and the adapter that it runs with. Its last token runs in a step after the others."""

    token_ids: list[int]
    adapter: AdapterInfo | None

    @property
    def num_virtual(self) -> int:
        """Virtual tokens before it."""
        return 0 if self.adapter is None else self.adapter.num_virtual_tokens

    @property
    def num_positions(self) -> int:
        """Positions that it takes."""
        return self.num_virtual + len(self.token_ids)


@dataclass(frozen=True)
class Said:
    """Logits, float32: after each token of a text's first chunk, and after its last token."""

    begun_BV: torch.Tensor
    last_V: torch.Tensor


@torch.inference_mode()
def probe(executor: BatchExecutor, texts: Sequence[Text]) -> list[Said]:
    """Run short texts beside each other, in blocks that are not shared.

    Raises:
        OutOfMemoryError: when there are too few blocks.
    """
    with executor.scheduler.temporary_blocks(*(text.num_positions for text in texts)) as blocks:
        chunks = [_chunks(text, own) for text, own in zip(texts, blocks, strict=True)]
        begun = _run(executor, [first for first, *_ in chunks])
        last = iter(_run(executor, [rest[0] for _, *rest in chunks if rest]))
        return [
            Said(rows_BV, next(last)[-1] if rest else rows_BV[-1])
            for rows_BV, (_, *rest) in zip(begun, chunks, strict=True)
        ]


def _run(executor: BatchExecutor, chunks: list[TokenChunk]) -> list[torch.Tensor]:
    """Return the logits of each chunk."""
    if executor.runner.limits.mixes_adapters:
        batches = [chunks] if chunks else []
    else:
        batches = [[chunk] for chunk in chunks]
    found: list[torch.Tensor] = []
    for batch in batches:
        logits = executor.runner.execute(ScheduledBatch(batch))
        counts = [chunk.num_logit_rows for chunk in batch]
        # A copy: the next step may overwrite the logits.
        found += logits.rows(range(sum(counts))).clone().split(counts)
    return found


def _chunks(text: Text, blocks: list[int]) -> list[TokenChunk]:
    adapter = None if text.adapter is None else text.adapter.adapter
    ids, num_virtual = text.token_ids, text.num_virtual
    end = len(ids) if len(ids) < _LEAST_TOKENS else len(ids) - 1
    begin = [*range(-1, -num_virtual - 1, -1), *ids[:end]]
    chunks = [TokenChunk(begin, 0, blocks, adapter, num_virtual)]
    return [*chunks, TokenChunk(ids[end:], len(begin), blocks, adapter, 0)] if end < len(ids) else chunks


def _check_tokens(executor: BatchExecutor, canary: Canary, num_virtual: int) -> None:
    """Check a recorded text before it runs: a digest does not say that it is one."""
    limits, ids = executor.runner.limits, canary.token_ids
    are_known = min(ids) >= 0 and max(ids) < limits.vocabulary_size
    if not are_known or len(ids) > min(_MAX_CANARY_TOKENS, limits.context_length - num_virtual):
        raise ArtifactCorruptError("What training recorded of the model is no short text of its base.")


def dtype_of(executor: BatchExecutor) -> torch.dtype:
    """Return the type of a runner's weights."""
    dtype: torch.dtype = getattr(torch, executor.runner.limits.dtype)
    return dtype


def verify_adapter(
    executor: BatchExecutor, adapter: AdapterInfo, probe_ids: list[int], canary: Canary | None
) -> None:
    """Check that an adapter's logits are finite, others than the base's, and those that training recorded.

    Args:
        executor: the adapter's; only its thread may call this.
        probe_ids: the text that is run where training recorded none.
        canary: what training recorded; None for artifacts that are older than that.

    Raises:
        ArtifactCorruptError: when the vocabularies differ.
        OutOfMemoryError: when there are too few blocks.
        SelfCheckError: when it fails.
    """
    ids = probe_ids
    if canary is not None:
        _check_tokens(executor, canary, adapter.num_virtual_tokens)
        ids = canary.token_ids
    wholes, firsts = ([Text(own, one) for one in (adapter, None)] for own in (ids, ids[:1]))
    said, base_said, row, base_row = probe(executor, [*wholes, *firsts])
    check_finite_logits(torch.cat([said.begun_BV, said.last_V[None], row.last_V[None]]))
    check_row(said.begun_BV[0], base_said.begun_BV[0], row.last_V, base_row.last_V)
    if gap_between(said.begun_BV, base_said.begun_BV) <= CANARY_TOLERANCE:
        # Beside others rounding may make a small change where there is none: each in a step of its own.
        (found,), (expected,) = (probe(executor, [whole]) for whole in wholes)
        check_probe(found.begun_BV, expected.begun_BV)
    check_canary(canary, dtype_of(executor), lambda _token_ids: said.last_V)


def verify_full(
    executor: BatchExecutor, probe_ids: list[int], base_logits_V: torch.Tensor, canary: Canary | None
) -> None:
    """Check that a full model's logits are finite, others than its base's, and those that training recorded.

    Args:
        base_logits_V: the base's after `probe_ids`, float32.
        canary: what training recorded; None for artifacts that are older than that.
    """
    texts = [Text(probe_ids, None)]
    if canary is not None:
        _check_tokens(executor, canary, 0)
        texts.append(Text(canary.token_ids, None))
    said = probe(executor, texts)
    check_probe(said[0].last_V, base_logits_V)
    check_canary(canary, dtype_of(executor), lambda _token_ids: said[-1].last_V)
