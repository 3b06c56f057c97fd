"""The runner of Llama-shaped bases on compiled kernels: `protocols.ModelRunner` over `PackedLlama`."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from luthier.modeling.load import read_weight
from luthier.modeling.protocols import (
    AdapterId,
    AdapterInfo,
    AdapterSource,
    Budget,
    LoadedWeights,
    RunnerLimits,
    ScheduledBatch,
    TokenChunk,
    UnsupportedAdapterError,
)
from luthier_cpu import refusal
from luthier_cpu.codegen.openmp import use_threads
from luthier_cpu.decode.adapter import PackedAdapter, can_pack_adapter, pack_adapter
from luthier_cpu.decode.batch import Chunk
from luthier_cpu.decode.batch_layout import PAGE_SIZE
from luthier_cpu.decode.llama import PackedLlama, can_pack_llama
from luthier_cpu.decode.sampling import Logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What these add to the time between two tokens of other sequences is what a small model takes for them.
_MAX_PREFILL_TOKENS = 256


@dataclass(frozen=True, eq=False)
class _PreparedSource(AdapterSource):
    """One that is prepared for this runner's kernels."""

    packed: PackedAdapter


class PackedRunner:
    """A packed base and its adapters.

    Args:
        model: its pages beyond `num_blocks` are those of one sequence of full length, for input vectors.
        read_weight: returns a linear layer's weight [O, K] by its path, for DoRA's norms.
        max_draft_tokens: of a sequence.
    """

    def __init__(
        self,
        model: PackedLlama,
        read_weight: Callable[[str], torch.Tensor],
        *,
        num_blocks: int,
        max_sequences: int,
        max_draft_tokens: int = 0,
    ) -> None:
        self.model = model
        self._read_weight = read_weight
        self._adapters: dict[AdapterId, PackedAdapter] = {}
        self._ids = itertools.count()
        self.limits = RunnerLimits(
            dtype=str(model.dtype).removeprefix("torch."),
            vocabulary_size=model.vocabulary_size,
            context_length=model.context_length,
            block_size=PAGE_SIZE,
            num_blocks=num_blocks,
            block_bytes=model.pages.page_bytes,
            max_sequences=max_sequences,
            max_prefill_tokens=_MAX_PREFILL_TOKENS,
            max_logit_rows=_MAX_PREFILL_TOKENS + max_sequences,
            max_draft_tokens=max_draft_tokens,
        )

    def prepare_adapter(self, source: AdapterSource) -> AdapterSource:
        """Lay an adapter out for the kernels; touches nothing that a step uses."""
        if isinstance(source, _PreparedSource):
            return source
        if source.parts is None or not can_pack_adapter(source.parts, self.model):
            raise UnsupportedAdapterError("The packed base has no place for this adapter.")
        packed = pack_adapter(source.parts, self.model, self._read_weight)
        return _PreparedSource(source.folder, None, packed)

    def add_adapter(self, source: AdapterSource) -> AdapterInfo:
        """Put an adapter beside the base; input vectors run once, and have keys and values from then on."""
        prepared = self.prepare_adapter(source)
        assert isinstance(prepared, _PreparedSource)
        packed = prepared.packed
        if packed.embeddings_ND is not None:
            self._run_vectors(packed, packed.embeddings_ND)
        adapter = next(self._ids)
        self._adapters[adapter] = packed
        return AdapterInfo(adapter, packed.num_virtual_tokens, packed.num_bytes)

    @torch.inference_mode()
    def _run_vectors(self, packed: PackedAdapter, vectors_ND: torch.Tensor) -> None:
        first_block = self.limits.num_blocks
        blocks = list(range(first_block, first_block + -(-len(vectors_ND) // PAGE_SIZE)))
        for first in range(0, len(vectors_ND), _MAX_PREFILL_TOKENS):
            part_ND = vectors_ND[first : first + _MAX_PREFILL_TOKENS]
            self.model.step([Chunk(part_ND, first, blocks, wants_logits=False)])
        packed.take_key_values(*self.model.pages.read(blocks, len(vectors_ND)))
        self.discard_blocks(blocks)

    def remove_adapter(self, adapter: AdapterId) -> None:
        """Free an adapter."""
        del self._adapters[adapter]

    def execute(self, batch: ScheduledBatch, on_launch: Callable[[], None] | None = None) -> Logits:
        """Run a batch; the logits may be overwritten by the next one."""
        return self.model.step([self._pack_chunk(one) for one in batch.chunks], on_launch=on_launch)

    def _pack_chunk(self, chunk: TokenChunk) -> Chunk:
        adapter = None if chunk.adapter is None else self._adapters[chunk.adapter]
        descriptor = None if adapter is None else adapter.descriptor
        ids = chunk.token_ids
        if len(ids) == 1 and ids[0] >= 0:
            return Chunk(ids, chunk.first_position, chunk.block_table, descriptor, chunk.logits_from == 0)
        if ids[0] < 0 and adapter is not None:
            num_virtual = adapter.num_virtual_tokens - chunk.first_position
            if num_virtual >= len(chunk.token_ids):
                raise ValueError("A chunk ends within an adapter's virtual tokens.")
            adapter.write_virtual(self.model.pages, chunk.block_table, chunk.first_position)
            chunk = replace(
                chunk,
                token_ids=chunk.token_ids[num_virtual:],
                first_position=adapter.num_virtual_tokens,
                logits_from=chunk.logits_from - num_virtual,
            )
        count, num_rows = len(chunk.token_ids), chunk.num_logit_rows
        if num_rows not in (0, 1, count, 1 + chunk.num_draft_tokens):
            raise ValueError(
                "Logits are wanted of all tokens of a chunk, of the last, of drafts, or of none."
            )
        return Chunk(
            chunk.token_ids,
            chunk.first_position,
            chunk.block_table,
            descriptor,
            wants_logits=num_rows > 0,
            wants_all_logits=num_rows == count > 1 and not chunk.num_draft_tokens,
            num_first_logits=chunk.num_draft_tokens,
            by_rows=chunk.num_draft_tokens > 0,
        )

    def discard_blocks(self, blocks: Sequence[int]) -> None:
        """Give the memory of unused blocks back."""
        self.model.pages.discard(blocks)

    def set_num_threads(self, count: int) -> None:
        """Set the number of threads."""
        use_threads(count)

    def close(self) -> None:
        """Drop the adapters; the weights leave with the last reference to this runner."""
        self._adapters.clear()


class PackedProvider:
    """Loads Llama-shaped models for the compiled kernels."""

    def refusal(self, model: "PreTrainedModel") -> str | None:
        """Refuse other architectures and devices, and machines without numba."""
        if not can_pack_llama(model):
            return "It is not a Llama whose every part is known."
        return refusal(model.device.type)

    def load(self, weights: LoadedWeights, budget: Budget) -> PackedRunner:
        """Pack a model, which is used up."""
        # One block more than whole tokens need: a token of a sequence may begin a new one.
        num_blocks = -(-budget.max_cache_tokens // PAGE_SIZE) + 1
        num_own = -(-weights.model.config.max_position_embeddings // PAGE_SIZE)
        return PackedRunner(
            PackedLlama(weights.model, num_pages=num_blocks + num_own),
            partial(read_weight, weights.folder),
            num_blocks=num_blocks,
            max_sequences=budget.max_sequences,
            max_draft_tokens=budget.max_draft_tokens,
        )
