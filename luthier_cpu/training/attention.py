"""Causal attention of the fast path: turned, parted, multiplied and merged with a backward pass by hand.

The query heads of one key head are its rows. Short rows go by pairs of bfloat16 at once where the processor
has such products (training/pair_attention.py), else by batched products and a softmax; long ones block by
block over their queries, which leaves out the keys that a block can't see, and the weights of a block are
made again in the backward pass, so that memory grows with the length and not with its square.

Legend: N tokens with their padding (B rows of T), E columns of q, k and v, K columns of a wide buffer,
P pairs of a row and a key head, Q queries of a pair (groups times T), S keys, C head size, V virtual tokens.

Tokens that all rows begin with are computed once: with causal attention nothing in them depends on what a row
has of its own. Their keys and values stand before each row's as those of virtual tokens do, and their
gradients are the sums over all rows. (The same thought for preference pairs: arXiv 2410.20305.)
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from luthier_cpu.codegen import kernels
from luthier_cpu.training import pair_attention

# Tokens whose queries are multiplied at a time, and the longest rows whose weights are kept for the backward
# pass, which go by pairs: both measured on two cores with heads of 64 numbers.
_BLOCK_TOKENS = 256
_MAX_KEPT_TOKENS = 160


class _Segment(NamedTuple):
    """Rows of tokens that attend alike: which of the N, the turning of each position, and keys before them.

    All of a segment's rows see the `start` keys before them, and then their own up to each query.
    """

    tokens: slice
    cosine_TC: torch.Tensor
    sine_TC: torch.Tensor
    start: int

    @property
    def num_tokens(self) -> int:
        """Tokens of each row."""
        return self.cosine_TC.shape[0]


@dataclass(frozen=True)
class Heads:
    """The order of q, k and v side by side, the turning of every position, and the width of the result.

    The first `num_shared` positions are the same in all rows, and are once before what each row has of its
    own: N is num_shared plus B times (T - num_shared).
    """

    num_heads: int
    num_kv_heads: int
    size: int
    cosine_TC: torch.Tensor
    sine_TC: torch.Tensor
    width: int
    num_shared: int = 0

    def segments(self, num_virtual: int) -> Iterator[_Segment]:
        """Yield what is shared, as one row, and what the rows have of their own."""
        shared = self.num_shared
        if shared:
            tokens = slice(0, shared)
            yield _Segment(tokens, self.cosine_TC[:shared], self.sine_TC[:shared], num_virtual)
        yield _Segment(
            slice(shared, None), self.cosine_TC[shared:], self.sine_TC[shared:], num_virtual + shared
        )


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
        before = None if virtual_key is None or virtual_value is None else (virtual_key, virtual_value)
        context.heads, context.num_virtual = heads, 0 if virtual_key is None else virtual_key.shape[1]
        out_NK = qkv_NE.new_empty(qkv_NE.shape[0], heads.width)
        saved: list[torch.Tensor] = []
        context.num_saved = []
        for segment in heads.segments(context.num_virtual):
            tensors = _attend_segment(qkv_NE, before, segment, heads, out_NK)
            context.num_saved.append(len(tensors))
            saved += tensors
            # A shared segment is one row, so its keys and values stand before each of the rows that follow.
            before = (tensors[1], tensors[2])
        context.save_for_backward(*saved)
        return out_NK

    @staticmethod
    def backward(context: Any, *gradients_out: torch.Tensor) -> tuple[Any, ...]:
        heads, gradient_NK = context.heads, gradients_out[0].contiguous()
        saved = list(context.saved_tensors)
        num_columns = (heads.num_heads + 2 * heads.num_kv_heads) * heads.size
        to_qkv_NE = gradient_NK.new_empty(gradient_NK.shape[0], num_columns)
        to_before: list[torch.Tensor] = []
        segments = list(heads.segments(context.num_virtual))
        for segment, num_saved in zip(segments[::-1], context.num_saved[::-1], strict=True):
            own, saved = saved[-num_saved:], saved[:-num_saved]
            to_before = _attend_segment_backward(gradient_NK, own, to_before, segment, heads, to_qkv_NE)
        return to_qkv_NE, *(to_before if context.num_virtual else (None, None)), None


def _attend_segment(
    qkv_NE: torch.Tensor,
    before: tuple[torch.Tensor, torch.Tensor] | None,
    segment: _Segment,
    heads: Heads,
    out_NK: torch.Tensor,
) -> list[torch.Tensor]:
    """Write what a segment's tokens attend to; return its queries, keys, values and the kept weights."""
    num_tokens, start = segment.num_tokens, segment.start
    query, key, value = kernels.split_heads(
        qkv_NE[segment.tokens],
        segment.cosine_TC,
        segment.sine_TC,
        scale=heads.size**-0.5,
        num_kv_heads=heads.num_kv_heads,
        start=start,
    )
    if before is not None:
        for whole, first in zip((key, value), before, strict=True):
            by_row = whole.view(-1, heads.num_kv_heads, *whole.shape[1:])
            by_row[:, :, :start] = first.to(whole.dtype)
    kept: list[torch.Tensor] = []
    if _goes_by_pairs(query, num_tokens):
        attended, *kept = pair_attention.attend(query, key, value, num_tokens, start)
    else:
        attended = torch.empty_like(query)
        for block in _blocks(num_tokens):
            weights = _weights(query, key, num_tokens, block, start)
            own = _of_block(attended, num_tokens, block)
            own.copy_(torch.bmm(weights, value[:, : start + block.stop]).view(own.shape))
            if num_tokens <= _MAX_KEPT_TOKENS:
                kept.append(weights)
    _rows_by_head(out_NK[segment.tokens], heads, num_tokens).copy_(_by_head(attended, heads, num_tokens))
    return [query, key, value, *kept]


def _attend_segment_backward(
    gradient_NK: torch.Tensor,
    saved: Sequence[torch.Tensor],
    from_after: Sequence[torch.Tensor],
    segment: _Segment,
    heads: Heads,
    to_qkv_NE: torch.Tensor,
) -> list[torch.Tensor]:
    """Write the gradients of a segment's tokens.

    Args:
        saved: what `_attend_segment` returned.
        from_after: float32, the gradients of all of this segment's keys and values that came from the
            segment after it, which sees them; empty when there is none.

    Returns:
        float32, the gradients of the keys and values before the segment's own; empty when there are none.
    """
    query, key, value, *kept = saved
    num_tokens, start = segment.num_tokens, segment.start
    to_before: list[torch.Tensor] = []
    gradient_PQC = torch.empty_like(query)
    rows_NK = gradient_NK[segment.tokens]
    _by_head(gradient_PQC, heads, num_tokens).copy_(_rows_by_head(rows_NK, heads, num_tokens))
    if _goes_by_pairs(query, num_tokens):
        to_query, to_key, to_value = pair_attention.attend_backward(
            gradient_PQC, query, key, value, kept[0], num_tokens, start
        )
    else:
        to_query, to_key, to_value = _by_blocks(gradient_PQC, saved, num_tokens, start)
    if from_after:
        wide = [own.float().add_(after) for own, after in zip((to_key, to_value), from_after, strict=True)]
        to_key, to_value = (one.to(key.dtype) for one in wide)
        to_before = [one[:, :start] for one in wide]
    elif start:
        by_row = (one.view(-1, heads.num_kv_heads, *one.shape[1:]) for one in (to_key, to_value))
        to_before = [one[:, :, :start].sum(dim=0, dtype=torch.float32) for one in by_row]
    kernels.split_heads_backward(
        to_query,
        to_key,
        to_value,
        segment.cosine_TC,
        segment.sine_TC,
        scale=heads.size**-0.5,
        num_kv_heads=heads.num_kv_heads,
        start=start,
        out_NE=to_qkv_NE[segment.tokens],
    )
    return to_before


def _by_head(whole_PQC: torch.Tensor, heads: Heads, num_tokens: int) -> torch.Tensor:
    """Return a view [rows, key heads, groups, T, C] of what belongs to queries."""
    return whole_PQC.view(-1, heads.num_kv_heads, whole_PQC.shape[1] // num_tokens, num_tokens, heads.size)


def _rows_by_head(rows_NK: torch.Tensor, heads: Heads, num_tokens: int) -> torch.Tensor:
    """Return a view of the same order of the first columns of rows of tokens."""
    columns = rows_NK[:, : heads.num_heads * heads.size].unflatten(0, (-1, num_tokens))
    return columns.unflatten(2, (heads.num_kv_heads, -1, heads.size)).permute(0, 2, 3, 1, 4)


def _goes_by_pairs(query_PQC: torch.Tensor, num_tokens: int) -> bool:
    return num_tokens <= _MAX_KEPT_TOKENS and pair_attention.can_attend(query_PQC)


def _by_blocks(
    gradient_PQC: torch.Tensor, saved: Sequence[torch.Tensor], num_tokens: int, start: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of a segment's queries, keys and values by batched products, block by block."""
    query, key, value, *kept = saved
    to_query = torch.empty_like(query)
    to_key, to_value = torch.zeros_like(key), torch.zeros_like(value)
    for block in _blocks(num_tokens):
        end = start + block.stop
        weights = kept[0] if kept else _weights(query, key, num_tokens, block, start)
        gradient = _of_block(gradient_PQC, num_tokens, block).flatten(1, 2)
        to_value[:, :end] += torch.bmm(weights.transpose(1, 2), gradient)
        to_scores = torch.bmm(gradient, value[:, :end].transpose(1, 2))
        to_scores = kernels.causal_softmax_backward_(
            to_scores, weights, block.stop - block.start, start + block.start
        )
        own = _of_block(to_query, num_tokens, block)
        own.copy_(torch.bmm(to_scores, key[:, :end]).view(own.shape))
        queries = _of_block(query, num_tokens, block).flatten(1, 2)
        to_key[:, :end] += torch.bmm(to_scores.transpose(1, 2), queries)
    return to_query, to_key, to_value


def _blocks(num_tokens: int) -> list[slice]:
    return [
        slice(begin, min(begin + _BLOCK_TOKENS, num_tokens)) for begin in range(0, num_tokens, _BLOCK_TOKENS)
    ]


def _weights(
    query: torch.Tensor, key: torch.Tensor, num_tokens: int, block: slice, start: int
) -> torch.Tensor:
    """Return the attention weights of a block's queries over the keys that its last one sees."""
    queries = _of_block(query, num_tokens, block).flatten(1, 2)
    scores = torch.bmm(queries, key[:, : start + block.stop].transpose(1, 2))
    return kernels.causal_softmax_(scores, block.stop - block.start, start + block.start)


def _of_block(whole_PQC: torch.Tensor, num_tokens: int, block: slice) -> torch.Tensor:
    """Return a view [P, groups, tokens, C] of the queries of a block's tokens."""
    return whole_PQC.unflatten(1, (-1, num_tokens))[:, :, block]
