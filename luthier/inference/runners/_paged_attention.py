"""Attention over a paged KV cache, for any decoder that uses transformers' attention interface.

The tokens of all sequences run as one row. Attention writes their keys and values into blocks and reads each
sequence's by its block table; the number of kernels does not depend on the number of sequences.

Legend: B sequences, T tokens of this pass, S tokens seen, H query heads, K key/value heads, N head size,
G query heads of one key/value head, Q tokens of the longest chunk, W blocks of the longest sequence.
"""

from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "luthier_paged"

# `attend` of the pass that runs. No argument of the model: a family may drop those that it does not know.
CURRENT: ContextVar[Callable[..., torch.Tensor]] = ContextVar("CURRENT")


@dataclass(frozen=True)
class AttentionOptions:
    """What else a layer asks for; `sinks` are [H]."""

    scale: float | None
    window: int | None
    soft_cap: float | None
    sinks: torch.Tensor | None


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,  # noqa: ARG001 - each batch makes its own
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_others: Any,
) -> tuple[torch.Tensor, None]:
    options = AttentionOptions(scaling, sliding_window, softcap, s_aux)
    return CURRENT.get()(module, query, key, value, options), None


ALL_ATTENTION_FUNCTIONS.register(NAME, _attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, lambda *_args, **_kwargs: None)


class KVCache:
    """Keys and values of every attention layer in blocks; heads and sizes may differ by layer.

    Args:
        layers: in the order of the forward pass, each with the shapes (K, N) of its keys and its values.
    """

    def __init__(
        self,
        layers: Iterable[tuple[nn.Module, torch.Size, torch.Size]],
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        places = [(module, shape) for module, *pair in layers for shape in pair]
        self._block_size, self._shapes = block_size, [shape for _, shape in places]
        # One tensor for all layers of a shape: clearing a block is one kernel.
        self._tensors = {
            shape: torch.zeros(
                self._shapes.count(shape), num_blocks, block_size, *shape, dtype=dtype, device=device
            )
            for shape in dict.fromkeys(self._shapes)
        }
        self.block_bytes = sum(one.nbytes for one in self._tensors.values()) // num_blocks
        parts = {shape: iter(tensor) for shape, tensor in self._tensors.items()}
        self._layers: dict[nn.Module, list[torch.Tensor]] = {}
        for module, shape in places:
            self._layers.setdefault(module, []).append(next(parts[shape]))

    def write(self, module: nn.Module, slots_T: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Write a layer's keys and values, [1, K, T, N]."""
        for stored, new in zip(self._layers[module], (key, value), strict=True):
            stored.flatten(0, 1).index_copy_(0, slots_T, new[0].transpose(0, 1))

    def read(self, module: nn.Module, table_BW: torch.Tensor) -> list[torch.Tensor]:
        """Return a layer's keys and values by block tables, each [B, K, S, N]."""
        return [
            stored.index_select(0, table_BW.flatten())
            .view(len(table_BW), -1, *stored.shape[2:])
            .transpose(1, 2)
            for stored in self._layers[module]
        ]

    def clear(self, blocks: torch.Tensor) -> None:
        """Zero blocks: attention multiplies what it masks by 0, which must not be NaN of another sequence."""
        for tensor in self._tensors.values():
            tensor.index_fill_(1, blocks, 0)

    def pack(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> list[torch.Tensor] | None:
        """Return a prefix's keys and values as `write_packed` takes them; None where they don't fit."""
        parts = [part.transpose(0, 1) for pair in pairs for part in pair]
        if [part.shape[1:] for part in parts] != self._shapes:
            return None
        return [
            torch.stack([part for part in parts if part.shape[1:] == shape]).to(tensor)
            for shape, tensor in self._tensors.items()
        ]

    def write_packed(self, packed: list[torch.Tensor], tokens: slice, slots: torch.Tensor) -> None:
        """Write some tokens of a prefix in all layers."""
        for tensor, part in zip(self._tensors.values(), packed, strict=True):
            tensor.flatten(1, 2).index_copy_(1, slots, part[:, tokens])


@dataclass(frozen=True)
class _ChunkGroup:
    """Chunks that attend together, padded to the longest.

    Attributes:
        gather: B·Q tokens of the pass; padding is the chunk's first token again.
        scatter: where their results belong; padding goes to the row after the last token.
    """

    gather: torch.Tensor
    scatter: torch.Tensor
    positions_BQ: torch.Tensor
    table_BW: torch.Tensor


@dataclass(frozen=True)
class PagedPass:
    """The attention of one batch."""

    cache: KVCache
    slots_T: torch.Tensor
    groups: Sequence[_ChunkGroup]
    block_size: int
    _masks: dict[tuple[int, int | None, int], torch.Tensor] = field(default_factory=dict)

    def attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        options: AttentionOptions,
    ) -> torch.Tensor:
        """Write keys and values, let every token attend to its sequence's; return [1, T, H, N]."""
        self.cache.write(module, self.slots_T, key, value)
        query_THN = query[0].transpose(0, 1)
        num_tokens, num_heads = query_THN.shape[:2]
        num_shared = num_heads // key.shape[1]
        out_THN = query.new_empty(num_tokens + 1, num_heads, value.shape[3])
        for number, group in enumerate(self.groups):
            sizes = group.positions_BQ.shape
            # Query heads that share a key/value head run as further tokens of it: nothing is repeated.
            query_BKQN = (
                query_THN.index_select(0, group.gather)
                .view(*sizes, key.shape[1], num_shared, -1)
                .permute(0, 2, 3, 1, 4)
                .flatten(2, 3)
            )
            keys_BKSN, values_BKSN = self.cache.read(module, group.table_BW)
            mask = self._mask(number, options.window, num_shared)
            found = _attend(query_BKQN, keys_BKSN, values_BKSN, mask, options)
            found = found.unflatten(2, (num_shared, -1)).permute(0, 3, 1, 2, 4)
            out_THN.index_copy_(0, group.scatter, found.reshape(-1, *out_THN.shape[1:]))
        return out_THN[None, :-1]

    def _mask(self, number: int, window: int | None, num_shared: int) -> torch.Tensor:
        """Return where a group's tokens attend, [B, 1, G·Q or 1, S]."""
        key = number, window, num_shared
        if key not in self._masks:
            group = self.groups[number]
            num_seen = group.table_BW.shape[1] * self.block_size
            columns_S = torch.arange(num_seen, device=group.table_BW.device)
            positions_BQ1 = group.positions_BQ[:, :, None]
            mask_BQS = columns_S <= positions_BQ1
            if window is not None:
                mask_BQS &= columns_S > positions_BQ1 - window
            if mask_BQS.shape[1] > 1:
                mask_BQS = mask_BQS.repeat(1, num_shared, 1)
            self._masks[key] = mask_BQS[:, None]
        return self._masks[key]


def _attend(
    query_BKQN: torch.Tensor,
    keys_BKSN: torch.Tensor,
    values_BKSN: torch.Tensor,
    mask: torch.Tensor,
    options: AttentionOptions,
) -> torch.Tensor:
    if not options.soft_cap and options.sinks is None:
        return scaled_dot_product_attention(
            query_BKQN, keys_BKSN, values_BKSN, attn_mask=mask, scale=options.scale
        )
    scale = query_BKQN.shape[-1] ** -0.5 if options.scale is None else options.scale
    scores = (query_BKQN @ keys_BKSN.transpose(-1, -2)).float() * scale
    if options.soft_cap:
        scores = options.soft_cap * torch.tanh(scores / options.soft_cap)
    scores = scores.masked_fill(~mask, -torch.inf)
    if options.sinks is not None:
        sinks_KG1 = options.sinks.float().view(scores.shape[1], -1, 1)
        sinks_KQ = sinks_KG1.expand(-1, -1, scores.shape[2] // sinks_KG1.shape[1]).flatten(1)
        scores = torch.cat([scores, sinks_KQ[None, :, :, None].expand(len(scores), -1, -1, 1)], dim=-1)
    weights = scores.softmax(-1)[..., : keys_BKSN.shape[2]]
    return weights.to(values_BKSN.dtype) @ values_BKSN


def group_chunks(
    positions: Sequence[range],
    tables: Sequence[Sequence[int]],
    block_size: int,
    send: Callable[[list[int]], torch.Tensor],
) -> list[_ChunkGroup]:
    """Group a pass's chunks: decoding ones, of one token, and longer ones, each padded among themselves.

    Args:
        positions: of each chunk's tokens.
        send: moves integers to the device.
    """
    num_tokens = sum(map(len, positions))
    decoding: list[tuple[int, range, Sequence[int]]] = []
    longer: list[tuple[int, range, Sequence[int]]] = []
    start = 0
    for span, table in zip(positions, tables, strict=True):
        (decoding if len(span) == 1 else longer).append((start, span, table[: -(-span.stop // block_size)]))
        start += len(span)
    groups = []
    for chunks in filter(None, (decoding, longer)):
        longest = max(len(span) for _, span, _ in chunks)
        width = max(len(table) for _, _, table in chunks)
        numbers: list[list[int]] = [[], [], [], []]
        for start, span, table in chunks:
            padding = longest - len(span)
            tokens = range(start, start + len(span))
            numbers[0] += [*tokens, *[start] * padding]
            numbers[1] += [*tokens, *[num_tokens] * padding]
            numbers[2] += [*span, *[span.start] * padding]
            # Its own blocks again, never another sequence's.
            numbers[3] += [*table, *[table[0]] * (width - len(table))]
        gather, scatter, positions_BQ, table_BW = map(send, numbers)
        shape = len(chunks), -1
        groups.append(_ChunkGroup(gather, scatter, positions_BQ.view(shape), table_BW.view(shape)))
    return groups
