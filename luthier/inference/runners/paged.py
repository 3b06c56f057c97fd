"""A runner in plain torch: any decoder of transformers, any mix of adapters in one batch, on CPU and CUDA.

It runs transformers' modules as they are loaded: attention is replaced through the library's attention
interface, and adapters act through hooks. Nothing here knows an architecture or a tuning method.

Legend: T tokens of this pass, D hidden size, V vocabulary, N virtual tokens, U wanted rows of logits.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from luthier.core.errors import ArtifactCorruptError
from luthier.inference.runners._model_probe import context_length, probe_model, reasons_against
from luthier.inference.runners._onednn import block_weights
from luthier.inference.runners._paged_attention import CURRENT, NAME, KVCache, PagedPass, group_chunks
from luthier.inference.runners._stacks import AdapterStacks, AdapterTokens, Placement
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

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# A nucleus of more tokens is left to the engine.
_MAX_NUCLEUS = 1024
_MAX_LOGIT_ROWS = 256
# Of a GPU's free memory, for keys and values.
_CACHE_SHARE = 0.8


@dataclass(frozen=True)
class _Adapter:
    """Its slot in the stacks, and its virtual tokens, stored as keys and values or run as input vectors."""

    slot: int | None = None
    key_values: list[torch.Tensor] | None = None
    embeddings_ND: torch.Tensor | None = None


_NO_ADAPTER = _Adapter()


@dataclass(frozen=True, eq=False)
class _PreparedSource(AdapterSource):
    """One that is in the model's type, on its device."""

    info: AdapterInfo
    placements: Sequence[Placement]
    key_values: list[torch.Tensor] | None
    embeddings_ND: torch.Tensor | None


@dataclass(frozen=True)
class _Chunk:
    """The tokens of a chunk that run in the pass: all but stored virtual ones."""

    adapter: _Adapter
    token_ids: Sequence[int]
    positions: range
    block_table: Sequence[int]
    num_logit_rows: int


class PagedRunner:
    """One transformers model with its adapters and a paged KV cache, which is allocated at once.

    Args:
        model: in evaluation mode, not refused, and the runner's own from now on.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        *,
        max_cache_tokens: int,
        block_size: int = 16,
        max_sequences: int = 64,
    ) -> None:
        probe = probe_model(model)
        vocabulary_size = len(model.get_output_embeddings().weight)
        block_weights(model)
        self._model, self._device = model, model.device
        # One block more than whole tokens need: a token of a sequence may begin a new one.
        num_blocks = -(-max_cache_tokens // block_size) + 1
        if self._device.type == "cuda":
            num_block_bytes = block_size * probe.token_bytes
            free_bytes, _ = torch.cuda.mem_get_info(self._device)
            num_blocks = max(1, min(num_blocks, int(_CACHE_SHARE * free_bytes) // num_block_bytes))
        self._cache = KVCache(
            probe.layers, num_blocks=num_blocks, block_size=block_size, dtype=probe.dtype, device=model.device
        )
        # Adapters are in its type and on its device.
        self._like = torch.empty(0, dtype=model.dtype, device=model.device)
        # transformers takes a mask of four dimensions as it is; without one it reads positions back.
        self._mask = self._like.new_zeros(1, 1, 1, 1)
        self._stacks = AdapterStacks(model, probe.linears, self._like)
        self._adapters: dict[AdapterId, _Adapter] = {}
        self._ids = itertools.count()
        # Places of virtual tokens in the pass, and their input vectors.
        self._virtual: tuple[torch.Tensor, torch.Tensor] | None = None
        self._hook = model.get_input_embeddings().register_forward_hook(self._embed_virtual_tokens)
        model.set_attn_implementation(NAME)
        self.limits = RunnerLimits(
            dtype=str(model.dtype).removeprefix("torch."),
            vocabulary_size=vocabulary_size,
            context_length=context_length(model) or num_blocks * block_size,
            block_size=block_size,
            num_blocks=num_blocks,
            block_bytes=self._cache.block_bytes,
            max_sequences=max_sequences,
            max_logit_rows=_MAX_LOGIT_ROWS + max_sequences,
            allocates_at_once=True,
            max_prefill_tokens=256,
        )
        if self._device.type != "cpu":
            # Prompt tokens that add little to the time between two tokens of the other sequences.
            self.limits = replace(
                self.limits,
                max_prefill_tokens=2048,
                short_prompt_tokens=512,
                long_chunk_tokens=2048,
                max_chunk_pairs=1 << 26,
            )

    def prepare_adapter(self, source: AdapterSource) -> AdapterSource:
        """Convert an adapter to the model's type on its device; touches nothing that a pass uses.

        Raises:
            ArtifactCorruptError: when it does not fit the weights.
            UnsupportedAdapterError: when only its method can attach it, or a layer can't be updated here.
        """
        if isinstance(source, _PreparedSource):
            return source
        parts = source.parts
        if parts is None:
            raise UnsupportedAdapterError("Only the adapter's own method can attach it.")
        key_values = self._cache.pack(parts.key_values) if parts.key_values else None
        size = self._model.get_input_embeddings().weight.shape[1]
        embeddings_ND = None if parts.embeddings_ND is None else parts.embeddings_ND.to(self._like)
        if (parts.key_values and not key_values) or (
            embeddings_ND is not None and embeddings_ND.shape[1] != size
        ):
            raise ArtifactCorruptError("The artifact's virtual tokens don't fit its base.")
        placements = self._stacks.prepare(parts)
        num_bytes = sum(tensor.numel() for tensor in parts.tensors) * self._like.itemsize
        info = AdapterInfo(next(self._ids), parts.num_virtual_tokens, num_bytes)
        return _PreparedSource(source.folder, None, info, placements, key_values, embeddings_ND)

    def add_adapter(self, source: AdapterSource) -> AdapterInfo:
        """Put an adapter beside the weights."""
        prepared = self.prepare_adapter(source)
        assert isinstance(prepared, _PreparedSource)
        slot = self._stacks.add(prepared.placements) if prepared.placements else None
        info = prepared.info
        self._adapters[info.adapter] = _Adapter(slot, prepared.key_values, prepared.embeddings_ND)
        return info

    def remove_adapter(self, adapter: AdapterId) -> None:
        """Free an adapter that no sequence uses."""
        slot = self._adapters.pop(adapter).slot
        if slot is not None:
            self._stacks.remove(slot)

    @torch.inference_mode()
    def execute(self, batch: ScheduledBatch, on_launch: Callable[[], None] | None = None) -> "PagedLogits":
        """Run a batch: write keys and values of its tokens into their blocks, return the wanted logits."""
        if on_launch is not None:
            on_launch()
        self._clear_begun_blocks(batch.chunks)
        chunks = [chunk for chunk in map(self._write_stored, batch.chunks) if chunk.token_ids]
        if not chunks:
            return PagedLogits(self._like.new_empty(0, self.limits.vocabulary_size))
        # By slot, those without one first.
        order = sorted(range(len(chunks)), key=lambda number: _slot(chunks[number]))
        ends = accumulate(len(chunks[number].token_ids) for number in order)
        end_of = dict(zip(order, ends, strict=True))
        wanted = [
            place
            for number, chunk in enumerate(chunks)
            for place in range(end_of[number] - chunk.num_logit_rows, end_of[number])
        ]
        return PagedLogits(self._forward([chunks[number] for number in order], wanted))

    def discard_blocks(self, blocks: Sequence[int]) -> None:
        """Do nothing: all blocks are allocated at once."""

    def set_num_threads(self, count: int) -> None:
        """Set the number of threads; nothing on CUDA."""
        if self._device.type == "cpu":
            torch.set_num_threads(count)

    def close(self) -> None:
        """Free the weights and all adapters."""
        self._stacks.close()
        self._hook.remove()
        self._adapters.clear()
        del self._model, self._cache

    def _forward(self, chunks: list[_Chunk], wanted: list[int]) -> torch.Tensor:
        """Run chunks, sorted by slot, and return the logits of the wanted tokens, [U, V]."""
        send, size = self._send, self.limits.block_size
        positions = [chunk.positions for chunk in chunks]
        tables = [chunk.block_table for chunk in chunks]
        attention = PagedPass(
            cache=self._cache,
            slots_T=send(
                [slot for pair in zip(positions, tables, strict=True) for slot in self._cache_slots(*pair)]
            ),
            groups=group_chunks(positions, tables, size, send),
            block_size=size,
        )
        self._stacks.tokens = self._adapter_tokens(chunks)
        self._virtual = self._virtual_tokens(chunks)
        current = CURRENT.set(attention.attend)
        try:
            found = self._model(
                input_ids=send([max(token, 0) for chunk in chunks for token in chunk.token_ids])[None],
                position_ids=send([position for span in positions for position in span])[None],
                attention_mask=self._mask,
                use_cache=False,
                logits_to_keep=send(wanted),
            )
        finally:
            CURRENT.reset(current)
            self._stacks.tokens = self._virtual = None
        logits_UV: torch.Tensor = found.logits[0]
        return logits_UV

    def _send(self, numbers: list[Any]) -> torch.Tensor:
        """Move integers to the device without waiting for it."""
        found = torch.tensor(numbers, dtype=torch.int64)
        if self._device.type == "cuda":
            found = found.pin_memory()
        return found.to(self._device, non_blocking=True)

    def _cache_slots(self, positions: range, table: Sequence[int]) -> list[int]:
        """Return where in the KV cache some positions of a sequence are."""
        size = self.limits.block_size
        return [table[position // size] * size + position % size for position in positions]

    def _clear_begun_blocks(self, chunks: Sequence[TokenChunk]) -> None:
        size = self.limits.block_size
        begun: list[int] = []
        for chunk in chunks:
            first, end = chunk.first_position, chunk.first_position + len(chunk.token_ids)
            begun += chunk.block_table[-(-first // size) : -(-end // size)]
        if begun:
            self._cache.clear(self._send(begun))

    def _write_stored(self, chunk: TokenChunk) -> _Chunk:
        """Write the keys and values of virtual tokens that have them, and return the chunk without those.

        Raises:
            ValueError: when it wants logits of one.
        """
        adapter = _NO_ADAPTER if chunk.adapter is None else self._adapters[chunk.adapter]
        num_stored = 0
        if adapter.key_values is not None:
            num_stored = sum(token < 0 for token in chunk.token_ids)
        first = chunk.first_position + num_stored
        if num_stored:
            slots = self._cache_slots(range(chunk.first_position, first), chunk.block_table)
            virtual = -1 - chunk.token_ids[0]
            assert adapter.key_values is not None
            self._cache.write_packed(
                adapter.key_values, slice(virtual, virtual + num_stored), self._send(slots)
            )
        token_ids = chunk.token_ids[num_stored:]
        if chunk.num_logit_rows > len(token_ids):
            raise ValueError("A virtual token that is stored as keys and values has no logits.")
        positions = range(first, first + len(token_ids))
        return _Chunk(adapter, token_ids, positions, chunk.block_table, chunk.num_logit_rows)

    def _adapter_tokens(self, chunks: list[_Chunk]) -> AdapterTokens | None:
        """Return which tokens of sorted chunks the stacks change; None for none."""
        slots = [_slot(chunk) for chunk in chunks for _ in chunk.token_ids]
        num_without = slots.count(-1)
        if num_without == len(slots):
            return None
        return AdapterTokens(num_without, slots[num_without:], self._stacks.num_slots, self._send)

    def _virtual_tokens(self, chunks: list[_Chunk]) -> tuple[torch.Tensor, torch.Tensor] | None:
        places: list[int] = []
        vectors = []
        tokens = [(token, chunk.adapter.embeddings_ND) for chunk in chunks for token in chunk.token_ids]
        for place, (token, embeddings_ND) in enumerate(tokens):
            if token < 0 and embeddings_ND is not None:
                places.append(place)
                vectors.append(embeddings_ND[-1 - token])
        return (self._send(places), torch.stack(vectors)) if places else None

    def _embed_virtual_tokens(self, _module: nn.Module, _args: Any, output: torch.Tensor) -> Any:
        """Put the input vectors of virtual tokens among those of real ones; a hook of the embeddings."""
        if self._virtual is None:
            return None
        places, vectors = self._virtual
        return output.index_copy(1, places, vectors[None])


def _slot(chunk: _Chunk) -> int:
    return -1 if chunk.adapter.slot is None else chunk.adapter.slot


class PagedLogits:
    """Logits of a batch's wanted rows, [U, V], in the model's type, on its device."""

    def __init__(self, logits_UV: torch.Tensor) -> None:
        self._logits_UV = logits_UV

    @torch.inference_mode()
    def greedy(self) -> list[int]:
        """Return the likeliest token of each row, of equals the first; -1 where a row is not finite."""
        largest_U, tokens_U = self._logits_UV.max(dim=-1)
        # A NaN anywhere in a row is its maximum.
        found: list[int] = tokens_U.masked_fill(~torch.isfinite(largest_U), -1).tolist()
        return found

    @torch.inference_mode()
    def draw(
        self,
        rows: Sequence[int],
        *,
        temperatures: Sequence[float],
        top_p: Sequence[float],
        points: Sequence[float],
    ) -> list[int | None]:
        """Draw a token of each of some rows, at points of [0, 1) of its mass; None: the engine samples it.

        With a `top_p` below 1 from the fewest likeliest tokens that reach it, the likeliest first (Holtzman
        et al. 2020, section 3.1); else from all, in the vocabulary's order.
        """
        options = torch.tensor([list(rows), temperatures, top_p, points], dtype=torch.float64)
        rows_U, temperatures_U, top_p_U, points_U = options.to(self._logits_UV.device)
        logits_UV = self._logits_UV.index_select(0, rows_U.long()).double()
        masses_UV = (logits_UV / temperatures_U[:, None]).softmax(dim=-1)
        drawn_U = _draw(masses_UV, points_U)
        if min(top_p, default=1.0) < 1.0:
            likeliest, ids = masses_UV.topk(min(_MAX_NUCLEUS, masses_UV.shape[-1]))
            before = likeliest.cumsum(-1) - likeliest
            nucleus = likeliest.masked_fill(before >= top_p_U[:, None], 0.0)
            from_nucleus_U = ids.gather(1, _draw(nucleus, points_U)[:, None])[:, 0]
            is_wide_U = nucleus.sum(-1) < top_p_U
            from_nucleus_U = from_nucleus_U.masked_fill(is_wide_U, -1)
            drawn_U = torch.where(top_p_U < 1.0, from_nucleus_U, drawn_U)
        drawn_U = drawn_U.masked_fill(~torch.isfinite(logits_UV.amax(-1)), -1)
        return [None if token < 0 else token for token in drawn_U.tolist()]

    @torch.inference_mode()
    def rows(self, rows: Sequence[int]) -> torch.Tensor:
        """Return some rows, float32 [U, V], on the runner's device."""
        index = torch.tensor(rows, dtype=torch.int64).to(self._logits_UV.device)
        return self._logits_UV.index_select(0, index).float()


class PagedProvider:
    """Loads decoders of transformers whose attention uses transformers' attention interface."""

    def refusal(self, model: "PreTrainedModel") -> str | None:
        """Return in one sentence why a model can't run here; None when it can."""
        return next(reasons_against(model), None)

    def load(self, weights: LoadedWeights, budget: Budget) -> PagedRunner:
        """Make a runner of a model, which is used up."""
        return PagedRunner(
            weights.model, max_cache_tokens=budget.max_cache_tokens, max_sequences=budget.max_sequences
        )


def _draw(masses_UV: torch.Tensor, points_U: torch.Tensor) -> torch.Tensor:
    """Return the token of each row at which the mass up to it passes a share of the whole."""
    sums_UV = masses_UV.cumsum(-1)
    targets_U1 = points_U[:, None] * sums_UV[:, -1:]
    return torch.searchsorted(sums_UV, targets_U1, right=True)[:, 0].clamp_max(masses_UV.shape[-1] - 1)
