"""Chunks that attend in tiles or pairs say what a softmax in float64 says."""

import math

import pytest
import torch

from luthier_cpu.decode.batch_layout import PAGE_SIZE, ChunkRows, HeadShape, Pages, token_rows, turn
from luthier_cpu.decode.ops import CompiledOps
from luthier_cpu.gemm.products import has_tiles

pytestmark = pytest.mark.skipif(not has_tiles(), reason="the processor has no products of pairs")
CONTEXT, NUM_PAGES = 1024, 160


def make_shape(num_kv_heads: int, groups: int, size: int) -> HeadShape:
    angles = torch.outer(torch.arange(CONTEXT), 1000 ** -(torch.arange(size // 2) * 2 / size))
    return HeadShape(num_kv_heads * groups, num_kv_heads, size, angles.cos(), angles.sin(), 1e-5)


def expected(
    shape: HeadShape, qkv_TE: torch.Tensor, first: int, keys: torch.Tensor, values: torch.Tensor
) -> torch.Tensor:
    """Return what tokens from a position on mix of the keys and values [H, tokens, C] of their sequence."""
    positions_T = torch.arange(first, first + len(qkv_TE))
    query = turn(qkv_TE[:, : shape.widths[0]].float().unflatten(-1, (-1, shape.size)), positions_T, shape)
    groups = shape.num_heads // shape.num_kv_heads
    keys, values = (part.double().repeat_interleave(groups, dim=0) for part in (keys, values))
    scores = torch.einsum("thc,hjc->htj", query.double(), keys) / math.sqrt(shape.size)
    scores.masked_fill_(torch.arange(keys.shape[1]) > positions_T[:, None], -torch.inf)
    return torch.einsum("htj,hjc->thc", scores.softmax(-1), values).flatten(1)


def test_what_is_no_number_stays_visible_and_what_is_hidden_counts_for_nothing() -> None:
    shape, like = make_shape(1, 2, 32), torch.empty(1, dtype=torch.bfloat16)
    pages = Pages(num_layers=1, num_pages=2, num_kv_heads=1, head_size=32, like=like)
    tokens = token_rows([(0, 20, [1, 0])], num_attending=0, are_alone=False)
    rows = ChunkRows([None], [slice(0, 20)], [0])
    ops = CompiledOps(shape, (*shape.widths, 32, 32, 32, 32), like, 8)
    qkv_NE = torch.randn(20, sum(shape.widths), generator=torch.Generator().manual_seed(0)).bfloat16()

    def attend(changed_NE: torch.Tensor) -> torch.Tensor:
        out_NK = torch.zeros(20, 64, dtype=torch.bfloat16)
        ops.attend(changed_NE, tokens, pages, 0, out_NK)
        ops.attend_chunks(changed_NE, tokens, rows, pages, 0, out_NK)
        return out_NK

    sound_NK = attend(qkv_NE)
    assert sound_NK.isfinite().all()
    for column in (0, 64, 96):
        for wrong in (float("nan"), float("inf")):
            changed_NE = qkv_NE.clone()
            changed_NE[7, column] = wrong
            found_NK = attend(changed_NE)
            assert not found_NK[7, :32].isfinite().all()
            # Who comes before does not see it, except as a value: no share of one is no number either.
            assert column == 96 or torch.equal(found_NK[:7], sound_NK[:7])
    # The first token's only key scores as low as can be: what it may not see must not take its place.
    changed_NE = qkv_NE.clone()
    changed_NE[0, :32], changed_NE[0, 64:96] = 3e38, -3e38
    assert not attend(changed_NE)[0, :32].isfinite().any()


@pytest.mark.usefixtures("num_threads")
@pytest.mark.parametrize("num_threads", [1, 3], indirect=True)
@pytest.mark.parametrize(
    ("num_kv_heads", "groups", "size"), [(3, 3, 64), (1, 1, 32), (2, 5, 96), (1, 8, 128)]
)
@pytest.mark.parametrize("chunks", [[(0, 2)], [(0, 300)], [(7, 20), (130, 64), (0, 16), (500, 33)]])
def test_tokens_mix_what_a_plain_softmax_mixes(
    num_kv_heads: int, groups: int, size: int, chunks: list[tuple[int, int]]
) -> None:
    generator = torch.Generator().manual_seed(len(chunks))
    shape = make_shape(num_kv_heads, groups, size)
    like = torch.empty(1, dtype=torch.bfloat16)
    pages = Pages(num_layers=1, num_pages=NUM_PAGES, num_kv_heads=num_kv_heads, head_size=size, like=like)
    # What was never written may hold anything.
    pages.keys.fill_(float("nan"))
    pages.values.fill_(float("nan"))
    free = torch.randperm(NUM_PAGES, generator=generator).tolist()
    owned = [[free.pop() for _ in range(-(-(first + count) // PAGE_SIZE))] for first, count in chunks]
    for (first, _), own in zip(chunks, owned, strict=True):
        positions = torch.arange(first)
        before = torch.randn(2, first, num_kv_heads, size, generator=generator)
        own_N = torch.tensor(own)[positions // PAGE_SIZE]
        pages.write(own_N, positions % PAGE_SIZE, *before.bfloat16()[:, :, None])
    places = [(first, count, own) for (first, count), own in zip(chunks, owned, strict=True)]
    tokens = token_rows(places, num_attending=0, are_alone=False)
    qkv_NE = torch.randn(len(tokens), sum(shape.widths), generator=generator).bfloat16()
    ends = torch.tensor([count for _, count in chunks]).cumsum(0).tolist()
    slices = [slice(end - count, end) for end, (_, count) in zip(ends, chunks, strict=True)]
    rows = ChunkRows([None] * len(places), slices, [first for first, _ in chunks])
    out_NK = torch.full((len(tokens), shape.widths[0]), float("nan"), dtype=torch.bfloat16)
    ops = CompiledOps(shape, (*shape.widths, size, size, size, size), like, 8)
    assert ops._prefill_attention is not None
    ops.attend(qkv_NE, tokens, pages, 0, out_NK)
    ops.attend_chunks(qkv_NE, tokens, rows, pages, 0, out_NK)
    for own_slice, (first, count), own in zip(slices, chunks, owned, strict=True):
        keys, values = pages.gather(0, torch.tensor(own), first + count)
        expected_TK = expected(shape, qkv_NE[own_slice], first, keys, values)
        gap = (out_NK[own_slice].double() - expected_TK).abs().max()
        # Queries, weights and results are rounded to bfloat16.
        assert gap < 0.03, gap
