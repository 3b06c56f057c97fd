"""Causal attention of the fast path: turned, parted, multiplied and merged with a backward pass by hand.

Three batched products and a softmax; the query heads of one key head are its rows. Long rows go block by
block over their queries, which leaves out the keys that a block can't see, and the weights of a block are
made again in the backward pass, so that memory grows with the length and not with its square.

Legend: N tokens with their padding (B rows of T), E columns of q, k and v, K columns of a wide buffer,
P pairs of a row and a key head, Q queries of a pair (groups times T), S keys, C head size, V virtual tokens.
"""

from dataclasses import dataclass
from typing import Any

import torch

from luthier.modeling import kernels

# Tokens whose queries are multiplied at a time, and the longest rows whose weights are kept for the backward
# pass: both measured on two cores with heads of 64 numbers.
_BLOCK_TOKENS = 256
_MAX_KEPT_TOKENS = 160


@dataclass(frozen=True)
class Heads:
    """How q, k and v lie side by side, the turning of every position, and the width of the result."""

    num_heads: int
    num_kv_heads: int
    size: int
    cosine_TC: torch.Tensor
    sine_TC: torch.Tensor
    width: int

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.cosine_TC.shape[0]


class Attention(torch.autograd.Function):
    """qkv_NE, and maybe the keys and values of virtual tokens, to the attended values in out_NK."""

    @staticmethod
    def forward(
        context: Any,
        qkv_NE: torch.Tensor,
        virtual_key: torch.Tensor | None,
        virtual_value: torch.Tensor | None,
        heads: Heads,
    ) -> torch.Tensor:
        start = 0 if virtual_key is None else virtual_key.shape[1]
        query, key, value = kernels.split_heads(
            qkv_NE,
            heads.cosine_TC,
            heads.sine_TC,
            scale=heads.size**-0.5,
            num_kv_heads=heads.num_kv_heads,
            start=start,
        )
        if virtual_key is not None and virtual_value is not None:
            for whole, virtual in ((key, virtual_key), (value, virtual_value)):
                by_row = whole.view(-1, heads.num_kv_heads, *whole.shape[1:])
                by_row[:, :, :start] = virtual.to(whole.dtype)
        kept: list[torch.Tensor] = []
        attended = torch.empty_like(query)
        for block in _blocks(heads.num_tokens):
            weights = _weights(query, key, heads.num_tokens, block, start)
            _put(attended, torch.bmm(weights, value[:, : start + block.stop]), heads.num_tokens, block)
            if heads.num_tokens <= _MAX_KEPT_TOKENS:
                kept.append(weights)
        context.heads, context.start = heads, start
        context.save_for_backward(query, key, value, *kept)
        return kernels.merge_heads(attended, heads.num_tokens, heads.num_kv_heads, heads.width)

    @staticmethod
    def backward(context: Any, *gradients_out: torch.Tensor) -> tuple[Any, ...]:
        query, key, value, *kept = context.saved_tensors
        heads, start = context.heads, context.start
        gradient_PQC = kernels.merge_heads_backward(
            gradients_out[0].contiguous(), heads.num_tokens, heads.num_kv_heads, heads.num_heads, heads.size
        )
        to_query = torch.empty_like(query)
        to_key, to_value = torch.zeros_like(key), torch.zeros_like(value)
        for block in _blocks(heads.num_tokens):
            end = start + block.stop
            weights = kept[0] if kept else _weights(query, key, heads.num_tokens, block, start)
            gradient = _take(gradient_PQC, heads.num_tokens, block)
            _add(to_value, torch.bmm(weights.transpose(1, 2), gradient), end)
            to_scores = torch.bmm(gradient, value[:, :end].transpose(1, 2))
            to_scores = kernels.causal_softmax_backward_(
                to_scores, weights, block.stop - block.start, start + block.start
            )
            _put(to_query, torch.bmm(to_scores, key[:, :end]), heads.num_tokens, block)
            queries = _take(query, heads.num_tokens, block)
            _add(to_key, torch.bmm(to_scores.transpose(1, 2), queries), end)
        to_qkv = kernels.split_heads_backward(
            to_query,
            to_key,
            to_value,
            heads.cosine_TC,
            heads.sine_TC,
            scale=heads.size**-0.5,
            num_kv_heads=heads.num_kv_heads,
            start=start,
        )
        if start == 0:
            return to_qkv, None, None, None
        virtual = [
            whole.view(-1, heads.num_kv_heads, *whole.shape[1:])[:, :, :start].sum(dim=0, dtype=torch.float32)
            for whole in (to_key, to_value)
        ]
        return to_qkv, *virtual, None


def _blocks(num_tokens: int) -> list[slice]:
    return [
        slice(begin, min(begin + _BLOCK_TOKENS, num_tokens)) for begin in range(0, num_tokens, _BLOCK_TOKENS)
    ]


def _weights(
    query: torch.Tensor, key: torch.Tensor, num_tokens: int, block: slice, start: int
) -> torch.Tensor:
    """Return the attention weights of a block's queries over the keys that its last one sees."""
    scores = torch.bmm(_take(query, num_tokens, block), key[:, : start + block.stop].transpose(1, 2))
    return kernels.causal_softmax_(scores, block.stop - block.start, start + block.start)


def _take(whole_PQC: torch.Tensor, num_tokens: int, block: slice) -> torch.Tensor:
    """Return the queries of a block's tokens in all groups."""
    if block.start == 0 and block.stop == num_tokens:
        return whole_PQC
    num_pairs, _, size = whole_PQC.shape
    return whole_PQC.view(num_pairs, -1, num_tokens, size)[:, :, block].reshape(num_pairs, -1, size)


def _put(whole_PQC: torch.Tensor, part: torch.Tensor, num_tokens: int, block: slice) -> None:
    """Write what belongs to the queries of a block's tokens."""
    num_pairs, _, size = whole_PQC.shape
    by_token = whole_PQC.view(num_pairs, -1, num_tokens, size)
    by_token[:, :, block] = part.view(num_pairs, -1, block.stop - block.start, size)


def _add(whole_PSC: torch.Tensor, part: torch.Tensor, end: int) -> None:
    whole_PSC[:, :end] += part
