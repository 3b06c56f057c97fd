"""Low-rank updates of chunks of tokens are the same in tiles or pairs as in torch's operators."""

import pytest
import torch

from luthier_cpu.decode.batch_layout import (
    ATTENTION_IN,
    ATTENTION_OUT,
    FEED_FORWARD_IN,
    FEED_FORWARD_OUT,
    AdapterDescriptor,
    ChunkRows,
    HeadShape,
    LowRankSite,
)
from luthier_cpu.decode.blocks import to_blocks
from luthier_cpu.decode.ops import CompiledOps
from luthier_cpu.gemm.products import has_tiles
from tests.luthier_cpu.reference_ops import PlainOps

pytestmark = pytest.mark.skipif(not has_tiles(), reason="the processor has no products of pairs")
SIZE, FEED_FORWARD = 96, 160
WIDTHS = (96, 32, 32, 96, FEED_FORWARD, FEED_FORWARD, 96)
INPUTS = (*[SIZE] * 6, FEED_FORWARD)
SHAPE = HeadShape(3, 1, 32, torch.zeros(64, 16), torch.zeros(64, 16), 1e-5)
GROUPS = (ATTENTION_IN, ATTENTION_OUT, FEED_FORWARD_IN, FEED_FORWARD_OUT)


def draw(*shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def make_adapter(ranks: list[int], seed: int, *, has_factors: bool = False) -> AdapterDescriptor:
    """Return two layers, the sites' ranks in turn, 0 for a site without an update."""
    layers: list[list[LowRankSite | None]] = []
    for layer in range(2):
        sites: list[LowRankSite | None] = []
        for number, (outputs, inputs) in enumerate(zip(WIDTHS, INPUTS, strict=True)):
            rank, own = ranks[(7 * layer + number) % len(ranks)], 100 * seed + 10 * layer + number
            a_RK = draw(rank, inputs, seed=own, scale=0.2).bfloat16()
            b = to_blocks(draw(rank, outputs, seed=own + 50, scale=0.2).bfloat16())
            factor_O = draw(outputs, seed=own + 70).abs() if has_factors else None
            sites.append(LowRankSite(a_RK, b, factor_O) if rank else None)
        layers.append(sites)
    return AdapterDescriptor(layers, [[None, None]] * 2)


ADAPTERS = {
    "small": lambda: make_adapter([4, 8, 0, 12], 1),
    "sixteen": lambda: make_adapter([16], 2),
    "wide": lambda: make_adapter([20, 64, 128], 3),
    "too wide": lambda: make_adapter([132], 4),
    "factors": lambda: make_adapter([16, 36], 5, has_factors=True),
}


@pytest.mark.usefixtures("num_threads")
@pytest.mark.parametrize("num_threads", [1, 3], indirect=True)
@pytest.mark.parametrize(
    "names", [["sixteen"], ["small", "wide", "too wide", "factors"], ["factors", "none"]]
)
def test_updates_of_chunks_are_those_of_plain_operators(names: list[str]) -> None:
    adapters = [ADAPTERS[name]() if name in ADAPTERS else None for name in names]
    lengths = [(2, 130, 16, 65)[number % 4] for number in range(len(names))]
    # Two single rows come first.
    ends = [2 + sum(lengths[: number + 1]) for number in range(len(names))]
    tokens = [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]
    chunks = ChunkRows(adapters, tokens, [0] * len(names))
    ops = CompiledOps(SHAPE, WIDTHS, torch.empty(1, dtype=torch.bfloat16), 1024)
    # Threads' memory holds what was there before.
    ops._scratch_of_threads()
    ops._scratch.fill_(torch.nan)
    for layer in range(2):
        for sites in GROUPS:
            x_NK = draw(ends[-1] + 1, INPUTS[sites.start], seed=layer).bfloat16()
            out_NO = draw(len(x_NK), sum(WIDTHS[sites]), seed=9).bfloat16()
            expected_NO, first_NO = out_NO.clone(), out_NO.clone()
            PlainOps(SHAPE, WIDTHS).add_low_rank_to_chunks(expected_NO, x_NK, chunks, layer, sites)
            ops.add_low_rank_to_chunks(out_NO, x_NK, chunks, layer, sites)
            torch.testing.assert_close(out_NO, expected_NO, rtol=2e-2, atol=6e-2)
            gap = (out_NO.float() - expected_NO.float()).abs().mean()
            assert gap < 0.02 * (expected_NO.float() - first_NO.float()).abs().mean()
            assert torch.equal(out_NO[:2], first_NO[:2])
            assert torch.equal(out_NO[ends[-1] :], first_NO[ends[-1] :])


def test_what_is_no_number_stays_visible() -> None:
    ops = CompiledOps(SHAPE, WIDTHS, torch.empty(1, dtype=torch.bfloat16), 1024)
    chunks = ChunkRows([ADAPTERS["sixteen"]()], [slice(0, 20)], [0])
    x_NK, out_NO = draw(20, SIZE, seed=1).bfloat16(), torch.zeros(20, 160, dtype=torch.bfloat16)
    x_NK[4, 7] = float("nan")
    ops.add_low_rank_to_chunks(out_NO, x_NK, chunks, 0, ATTENTION_IN)
    assert out_NO[4].isnan().all()
    assert out_NO[[*range(4), *range(5, 20)]].isfinite().all()
