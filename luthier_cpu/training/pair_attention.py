"""Causal attention of a training step's short rows in pairs of bfloat16, on processors with such products.

Forward and backward are one call each for all rows and heads, where batched products are two and four with
passes in between. Legend as in training/attention.py; W the keys, filled up to a multiple of 16.
"""

from functools import cache
from itertools import starmap

import torch

from luthier_cpu.codegen import kernels
from luthier_cpu.codegen.openmp import launch
from luthier_cpu.gemm.panel_products import come_out_right, has_panels, largest_difference, scratch

# Columns of a panel, the bytes of its line of pairs, and of a line of zeros before a thread's panels.
COLUMNS, LINE_BYTES, HEAD_BYTES = 64, 256, 256
# What the width of weights and a head's size must be a multiple of.
_TILE = 16
_SIZE_ALIGN = 32
_PAGE = 4096


def can_attend(query_PQC: torch.Tensor) -> bool:
    """Whether attention of such queries is made by pairs here."""
    return (
        query_PQC.dtype == torch.bfloat16
        and query_PQC.device.type == "cpu"
        and query_PQC.shape[2] % _SIZE_ALIGN == 0
        and _is_right()
    )


def attend(
    query_PQC: torch.Tensor, key_PSC: torch.Tensor, value_PSC: torch.Tensor, num_tokens: int, start: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend; query q is token q mod `num_tokens` and sees the first `start` keys and those up to its own.

    Args:
        query_PQC: scaled; with keys and values such as `can_attend` says yes to.
        key_PSC: of the `start` and the tokens.
        num_tokens: tokens of the queries.
        start: keys that all queries see.

    Returns:
        attended_PQC, and weights_PQW for `attend_backward`.

    Raises:
        ValueError: when a tensor is of another shape or type, or the processor has no products of pairs.
    """
    sizes = _sizes(query_PQC, key_PSC, num_tokens, start)
    _check(query_PQC)
    _check(key_PSC, value_PSC)
    weights_PQW = query_PQC.new_empty(*query_PQC.shape[:2], sizes[-1])
    attended_PQC = torch.empty_like(query_PQC)
    tensors = (query_PQC, key_PSC, value_PSC, weights_PQW, attended_PQC)
    num_bytes = HEAD_BYTES + _panel_bytes(query_PQC, key_PSC)
    _run("attend_pairs", sizes, tensors, num_bytes)
    return attended_PQC, weights_PQW


def attend_backward(
    gradient_PQC: torch.Tensor,
    query_PQC: torch.Tensor,
    key_PSC: torch.Tensor,
    value_PSC: torch.Tensor,
    weights_PQW: torch.Tensor,
    num_tokens: int,
    start: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of queries, keys and values from that of `attend`'s result.

    Args:
        query_PQC: as `attend` had it.
        num_tokens: as it had it.

    Raises:
        ValueError: when a tensor is of another shape or type, or the processor has no products of pairs.
    """
    sizes = _sizes(query_PQC, key_PSC, num_tokens, start)
    _check(query_PQC, gradient_PQC)
    _check(key_PSC, value_PSC)
    _check(weights_PQW)
    num_queries, width = query_PQC.shape[1], sizes[-1]
    if weights_PQW.shape != (*query_PQC.shape[:2], width):
        raise ValueError("Attention by pairs takes the weights of these queries and keys.")
    made = [torch.empty_like(one) for one in (query_PQC, key_PSC, value_PSC)]
    tensors = (query_PQC, key_PSC, value_PSC, weights_PQW, gradient_PQC, *made)
    panel_bytes = _panel_bytes(query_PQC, key_PSC)
    num_bytes = HEAD_BYTES + panel_bytes + num_queries * width * 2 + (num_queries + 1) // 2 * width * 4
    _run("attend_pairs_backward", sizes, tensors, num_bytes, panel_bytes)
    return made[0], made[1], made[2]


@cache
def _is_right() -> bool:
    """Whether attention by pairs runs here: the processor is one for it, and some comes out right."""
    sizes = ((2, 2, 7, 3, 96), (1, 3, 37, 40, 64))
    return has_panels() and come_out_right("Results of attention by pairs", starmap(_largest_gap, sizes))


def _largest_gap(num_pairs: int, groups: int, num_tokens: int, start: int, size: int) -> float:
    """Return by how much attention of random numbers is off, as a share of the largest number."""
    generator = torch.Generator().manual_seed(0)

    def random(num_rows: int) -> torch.Tensor:
        return torch.randn(num_pairs, num_rows, size, generator=generator).bfloat16()

    num_queries, num_keys = groups * num_tokens, start + num_tokens
    query, key, value, gradient = map(random, (num_queries, num_keys, num_keys, num_queries))
    query *= size**-0.5
    attended, weights_PQW = attend(query, key, value, num_tokens, start)
    found = [attended, *attend_backward(gradient, query, key, value, weights_PQW, num_tokens, start)]
    q, k, v, g = (one.float() for one in (query, key, value, gradient))
    is_hidden_QS = torch.arange(num_keys) > torch.arange(num_queries)[:, None] % num_tokens + start
    weights = torch.softmax(torch.bmm(q, k.transpose(1, 2)).masked_fill(is_hidden_QS, float("-inf")), dim=-1)
    to_weights = torch.bmm(g, v.transpose(1, 2))
    to_scores = weights * (to_weights - (to_weights * weights).sum(dim=-1, keepdim=True))
    expected = [
        torch.bmm(weights, v),
        torch.bmm(to_scores, k),
        torch.bmm(to_scores.transpose(1, 2), q),
        torch.bmm(weights.transpose(1, 2), g),
    ]
    return largest_difference(found, expected)


def _check(like: torch.Tensor, *others: torch.Tensor) -> None:
    for one in (like, *others):
        is_fit = one.dtype == torch.bfloat16 and one.device.type == "cpu" and one.is_contiguous()
        if one.shape != like.shape or not is_fit:
            raise ValueError("Attention by pairs takes contiguous bfloat16 of one shape on the CPU.")


def _sizes(query_PQC: torch.Tensor, key_PSC: torch.Tensor, num_tokens: int, start: int) -> tuple[int, ...]:
    if not has_panels():
        raise ValueError("Attention by pairs takes a processor with products of pairs.")
    num_pairs, num_queries, size = query_PQC.shape
    num_keys = start + num_tokens
    are_whole = num_tokens > 0 <= start and num_queries % num_tokens == 0 and size % _SIZE_ALIGN == 0
    if not are_whole or key_PSC.shape != (num_pairs, num_keys, size):
        raise ValueError("Attention by pairs takes whole heads and all their keys.")
    return num_pairs, num_queries, num_keys, size, num_tokens, start, -(-num_keys // _TILE) * _TILE


def _panel_bytes(query_PQC: torch.Tensor, key_PSC: torch.Tensor) -> int:
    """Return the bytes of the largest panel: pairs of a head's numbers, of keys, or of queries."""
    most = max(query_PQC.shape[1], key_PSC.shape[1], query_PQC.shape[2])
    return (most + 1) // 2 * LINE_BYTES


def _run(
    name: str, sizes: tuple[int, ...], tensors: tuple[torch.Tensor, ...], num_bytes: int, *more: int
) -> None:
    num_bytes = -(-num_bytes // _PAGE) * _PAGE
    room = scratch(num_bytes * torch.get_num_threads())
    addresses = [one.data_ptr() for one in tensors]
    launch(kernels.compiled_address(name, torch.bfloat16), [*sizes, *addresses, room, num_bytes, *more])
