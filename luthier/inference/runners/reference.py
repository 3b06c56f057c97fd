"""The reference runner: transformers' forward pass on any causal language model, one adapter a batch.

Correct before fast: other runners are compared with it. Keys and values of the blocks are copied into a
cache of transformers for each pass, and those of the pass back.

Legend: `B` sequences, `T` tokens of this pass, `W` tokens in the cache, `V` vocabulary, `P` blocks, `S` their
size, `H` key/value heads, `C` head size.
"""

import copy
import inspect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from luthier.core.errors import ArtifactCorruptError, InvalidRequestError
from luthier.inference.runners.paged import PagedLogits
from luthier.methods import Attached, Method, method_of_artifact
from luthier.modeling.protocols import (
    AdapterId,
    AdapterInfo,
    AdapterSource,
    Budget,
    LoadedWeights,
    RunnerLimits,
    ScheduledBatch,
    TokenChunk,
)

# Keys and values of every layer, each [H, virtual tokens, C].
Prefix = Sequence[tuple[torch.Tensor, torch.Tensor]]

_BLOCK_SIZE = 16
_MAX_PREFILL_TOKENS = 512
# Raised by transformers, PEFT and methods for an artifact that does not fit the model. InvalidRequestError:
# an error that training would report of the user's parameters.
_MISFIT = (RuntimeError, ValueError, KeyError, TypeError, OSError, SafetensorError, InvalidRequestError)


class ReferenceRunner:
    """A model of transformers, and one for each adapter as its method loads it. All share the weights.

    Args:
        model: keeps keys and values of every layer in transformers' cache.
    """

    def __init__(self, model: PreTrainedModel, *, num_blocks: int, max_sequences: int) -> None:
        self._model = model
        self._ids = itertools.count()
        self._adapters: dict[AdapterId, tuple[PreTrainedModel, Prefix]] = {}
        self._layers = [
            [part.new_empty(num_blocks, part.shape[1], _BLOCK_SIZE, part.shape[3]) for part in pair]
            for pair in self._run_one_token()
        ]
        config = model.config.get_text_config()
        self.limits = RunnerLimits(
            dtype=str(model.dtype).removeprefix("torch."),
            vocabulary_size=config.vocab_size,
            context_length=getattr(config, "max_position_embeddings", None) or num_blocks * _BLOCK_SIZE,
            block_size=_BLOCK_SIZE,
            num_blocks=num_blocks,
            block_bytes=sum(part.nbytes for pair in self._layers for part in pair) // num_blocks,
            max_sequences=max_sequences,
            max_prefill_tokens=_MAX_PREFILL_TOKENS,
            max_logit_rows=_MAX_PREFILL_TOKENS + max_sequences,
            mixes_adapters=False,
            short_prompt_tokens=_MAX_PREFILL_TOKENS,
            long_chunk_tokens=_MAX_PREFILL_TOKENS,
            max_chunk_pairs=_MAX_PREFILL_TOKENS * num_blocks * _BLOCK_SIZE,
            allocates_at_once=True,
        )

    def prepare_adapter(self, source: AdapterSource) -> AdapterSource:
        """Return the source as it is: methods read their own files."""
        return source

    @torch.no_grad()
    def add_adapter(self, source: AdapterSource) -> AdapterInfo:
        """Load an adapter by its own method, on modules of its own over the model's weights.

        Raises:
            ArtifactCorruptError: when it does not fit the model.
        """
        method = method_of_artifact(source.folder)
        try:
            attached = method.load(share_weights(self._model), source.folder)
            prefix = _prefix(method, attached)
        except _MISFIT as error:
            raise ArtifactCorruptError("The artifact can't be loaded on its base model.") from error
        adapter = next(self._ids)
        self._adapters[adapter] = attached.causal_lm, prefix
        num_bytes = sum(path.stat().st_size for path in source.folder.glob("*.safetensors"))
        return AdapterInfo(adapter, prefix[0][0].shape[1] if prefix else 0, num_bytes)

    def remove_adapter(self, adapter: AdapterId) -> None:
        """Drop an adapter's modules."""
        del self._adapters[adapter]

    @torch.inference_mode()
    def execute(
        self, batch: ScheduledBatch, on_launch: Callable[[], None] | None = None
    ) -> "ReferenceLogits":
        """Run a batch, chunks of one token together and each longer one by itself."""
        [adapter] = {chunk.adapter for chunk in batch.chunks}
        if on_launch is not None:
            on_launch()
        chunks = [self._without_virtual(chunk) for chunk in batch.chunks]
        model = self._model if adapter is None else self._adapters[adapter][0]
        found: dict[int, torch.Tensor] = {}
        singles = [place for place, chunk in enumerate(chunks) if len(chunk.token_ids) == 1]
        others = [[place] for place in range(len(chunks)) if len(chunks[place].token_ids) > 1]
        for places in ([singles] if singles else []) + others:
            logits_BTV = self._run(model, [chunks[place] for place in places])
            for place, logits_TV in zip(places, logits_BTV, strict=True):
                found[place] = logits_TV[chunks[place].logits_from :]
        return ReferenceLogits(torch.cat([found[place] for place in range(len(chunks))]))

    def _run(self, model: PreTrainedModel, chunks: list[TokenChunk]) -> torch.Tensor:
        """Run chunks of one length, their cached tokens padded on the left; return logits_BTV."""
        device, num_tokens = model.device, len(chunks[0].token_ids)
        width = max(chunk.first_position for chunk in chunks)
        past = DynamicCache()
        if width:
            for layer, pair in enumerate(self._layers):
                past.update(*(self._gather(part, chunks, width) for part in pair), layer)
        firsts_B1 = torch.tensor([[chunk.first_position] for chunk in chunks], device=device)
        columns_1W = torch.arange(width + num_tokens, device=device)[None]
        mask_BW = (columns_1W >= width - firsts_B1).long()
        positions_BT = firsts_B1 + torch.arange(num_tokens, device=device)
        ids_BT = torch.tensor([list(chunk.token_ids) for chunk in chunks], device=device)
        logits_BTV = forward(model, past, ids_BT, mask_BW, positions_BT)
        for pair, layer in zip(self._layers, past.layers, strict=True):
            for part, whole_BHWC in zip(pair, (layer.keys, layer.values), strict=True):
                for chunk, whole_HWC in zip(chunks, whole_BHWC, strict=True):
                    self._write(part, chunk.block_table, chunk.first_position, whole_HWC[:, -num_tokens:])
        return logits_BTV

    @staticmethod
    def _gather(part_PHSC: torch.Tensor, chunks: list[TokenChunk], width: int) -> torch.Tensor:
        _, num_heads, size, head_size = part_PHSC.shape
        gathered_BHWC = part_PHSC.new_zeros(len(chunks), num_heads, width, head_size)
        for own_HWC, chunk in zip(gathered_BHWC, chunks, strict=True):
            count = chunk.first_position
            if count:
                blocks = torch.tensor(chunk.block_table[: -(-count // size)], device=part_PHSC.device)
                held_HWC = part_PHSC[blocks].transpose(0, 1).flatten(1, 2)
                own_HWC[:, width - count :] = held_HWC[:, :count]
        return gathered_BHWC

    @staticmethod
    def _write(part_PHSC: torch.Tensor, table: Sequence[int], first: int, new_HTC: torch.Tensor) -> None:
        positions = torch.arange(first, first + new_HTC.shape[1], device=part_PHSC.device)
        size = part_PHSC.shape[2]
        blocks = torch.tensor(table, device=part_PHSC.device)[positions // size]
        part_PHSC[blocks, :, positions % size] = new_HTC.transpose(0, 1)

    def _without_virtual(self, chunk: TokenChunk) -> TokenChunk:
        """Write the virtual tokens that a chunk begins with into its blocks; return the rest of it."""
        num_virtual = sum(token < 0 for token in chunk.token_ids)
        if not num_virtual or chunk.adapter is None:
            return chunk
        first = -1 - chunk.token_ids[0]
        for pair, given in zip(self._layers, self._adapters[chunk.adapter][1], strict=True):
            for part, whole_HNC in zip(pair, given, strict=True):
                new_HTC = whole_HNC[:, first : first + num_virtual]
                self._write(part, chunk.block_table, chunk.first_position, new_HTC)
        return replace(
            chunk,
            token_ids=chunk.token_ids[num_virtual:],
            first_position=chunk.first_position + num_virtual,
            logits_from=chunk.logits_from - num_virtual,
        )

    @torch.inference_mode()
    def _run_one_token(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return keys and values [1, H, 1, C] of a token in each layer."""
        past, one_11 = DynamicCache(), torch.zeros(1, 1, dtype=torch.long, device=self._model.device)
        forward(self._model, past, one_11, torch.ones_like(one_11), one_11)
        return [(layer.keys, layer.values) for layer in past.layers]

    def discard_blocks(self, blocks: Sequence[int]) -> None:
        """Do nothing: all blocks are allocated at once."""

    def set_num_threads(self, count: int) -> None:
        """Set the number of threads."""
        torch.set_num_threads(count)

    def close(self) -> None:
        """Drop all adapters."""
        self._adapters.clear()


def share_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model of the same weights whose modules may be replaced."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def _prefix(method: Method, attached: Attached) -> Prefix:
    """Return the keys and values of an adapter's virtual tokens; empty where it has none."""
    model, embeddings_ND = attached.causal_lm, method.virtual_embeddings(attached)
    if embeddings_ND is None:
        return method.virtual_key_values(attached) or []
    past = DynamicCache()
    _, cache_argument = _forward_arguments(type(model).forward)
    model(inputs_embeds=embeddings_ND[None], use_cache=True, **{cache_argument: past})
    return [(layer.keys[0], layer.values[0]) for layer in past.layers]


class ReferenceLogits(PagedLogits):
    """Logits whose tokens the engine draws."""

    def draw(
        self,
        rows: Sequence[int],
        *,
        temperatures: Sequence[float],  # noqa: ARG002
        top_p: Sequence[float],  # noqa: ARG002
        points: Sequence[float],  # noqa: ARG002
    ) -> list[int | None]:
        """Leave every row to the engine."""
        return [None] * len(rows)


class ReferenceProvider:
    """Loads any causal language model of transformers."""

    def refusal(self, model: PreTrainedModel) -> None:  # noqa: ARG002
        """Refuse none."""
        return

    def load(self, weights: LoadedWeights, budget: Budget) -> ReferenceRunner:
        """Make a runner of a model."""
        num_blocks = -(-budget.max_cache_tokens // _BLOCK_SIZE) + 1
        return ReferenceRunner(weights.model, num_blocks=num_blocks, max_sequences=budget.max_sequences)


def forward(
    model: PreTrainedModel,
    past: DynamicCache,
    ids_BT: torch.Tensor,
    mask_BW: torch.Tensor,
    positions_BT: torch.Tensor,
) -> torch.Tensor:
    """Run tokens after the W - T of a cache, which grows by them; return logits_BTV in the model's type."""
    takes_positions, cache_argument = _forward_arguments(type(model).forward)
    arguments: dict[str, Any] = {
        "input_ids": ids_BT,
        "attention_mask": mask_BW,
        "use_cache": True,
        cache_argument: past,
    }
    if takes_positions:
        arguments["position_ids"] = positions_BT
    logits_BTV: torch.Tensor = model(**arguments).logits
    return logits_BTV


@cache
def _forward_arguments(method: Callable[..., Any]) -> tuple[bool, str]:
    """Return whether a model takes positions, and its name for the cache, which transformers changed."""
    arguments = inspect.signature(method).parameters
    return "position_ids" in arguments, "cache" if "cache" in arguments else "past_key_values"
