"""In bfloat16 the kernels of single rows do what torch's operators do (in float32: test_packed.py)."""

import pytest
import torch

from luthier_cpu.codegen import kernels
from luthier_cpu.decode.batch_layout import (
    ACTIVATIONS,
    FEED_FORWARD_IN,
    FEED_FORWARD_OUT,
    PAGE_SIZE,
    AdapterDescriptor,
    BottleneckSite,
    HeadShape,
    LowRankSite,
    Pages,
    SingleRows,
    token_rows,
)
from luthier_cpu.decode.blocks import to_blocks
from luthier_cpu.decode.ops import CompiledOps
from tests.luthier_cpu.reference_ops import PlainOps

pytestmark = pytest.mark.skipif(not kernels.is_compiled(torch.empty(1)), reason="numba is not installed")
LIKE = torch.empty(1, dtype=torch.bfloat16)


def draw(*shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).bfloat16()


def make_ops(size: int, feed_forward: int) -> tuple[CompiledOps, PlainOps]:
    shape = HeadShape(2, 1, size // 2, torch.zeros(64, size // 4), torch.zeros(64, size // 4), 1e-5)
    widths = (size, size // 2, size // 2, size, feed_forward, feed_forward, size)
    return CompiledOps(shape, widths, LIKE, 1024), PlainOps(shape, widths)


def assert_alike(found: torch.Tensor, expected: torch.Tensor, before: torch.Tensor) -> None:
    """Hold what was added within a few units of the results' last place."""
    change = float((expected.float() - before.float()).abs().mean())
    assert change > 0
    assert float((found.float() - expected.float()).abs().mean()) < 0.02 * change


@pytest.mark.parametrize("size", [32, 96, 40, 576])
@pytest.mark.parametrize("ranks", [(4, 16), (20, 1024)])
def test_low_ranks_of_rows_are_those_of_plain_operators(size: int, ranks: tuple[int, int]) -> None:
    feed_forward = size + 32
    compiled, plain = make_ops(size, feed_forward)

    def site(outputs: int, inputs: int, rank: int, seed: int, *, has_factor: bool) -> LowRankSite:
        a_RK, b_RO = draw(rank, inputs, seed=seed, scale=0.2), draw(rank, outputs, seed=seed + 1, scale=0.2)
        factor_O = draw(outputs, seed=seed + 2).float().abs() if has_factor else None
        return LowRankSite(a_RK, to_blocks(b_RO), factor_O)

    def adapter(rank: int, seed: int, *, has_factor: bool) -> AdapterDescriptor:
        gate = site(feed_forward, size, rank, seed, has_factor=has_factor)
        down = site(size, feed_forward, rank, seed + 10, has_factor=has_factor)
        return AdapterDescriptor([[None, None, None, None, gate, None, down]], [[None, None]])

    first, second = adapter(ranks[0], 1, has_factor=False), adapter(ranks[1], 40, has_factor=True)
    rows = SingleRows([first, None, second, first])
    for sites, inputs in ((FEED_FORWARD_IN, size), (FEED_FORWARD_OUT, feed_forward)):
        outputs = 2 * feed_forward if sites == FEED_FORWARD_IN else size
        x_NK, before_NO = draw(5, inputs, seed=90), draw(5, outputs, seed=91)
        found_NO, expected_NO = before_NO.clone(), before_NO.clone()
        compiled.add_low_rank(found_NO, x_NK, rows, 0, sites)
        plain.add_low_rank(expected_NO, x_NK, rows, 0, sites)
        assert_alike(found_NO, expected_NO, before_NO)
        assert torch.equal(found_NO[[1, 4]], before_NO[[1, 4]])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("size", "middle"), [(32, 4), (96, 20), (40, 8), (576, 64)])
def test_bottlenecks_of_rows_are_those_of_plain_operators(size: int, middle: int, activation: str) -> None:
    compiled, plain = make_ops(size, size)

    def site(seed: int, *, is_parallel: bool) -> BottleneckSite:
        down_MD, up_MD = (
            draw(middle, size, seed=seed, scale=0.3),
            draw(middle, size, seed=seed + 1, scale=0.3),
        )
        down_M, up_D = draw(middle, seed=seed + 2).float(), draw(size, seed=seed + 3).float()
        return BottleneckSite(down_MD, down_M, to_blocks(up_MD), up_D, activation, is_parallel)

    serial = AdapterDescriptor([[None] * 7], [[site(1, is_parallel=False), None]])
    parallel = AdapterDescriptor([[None] * 7], [[site(9, is_parallel=True), None]])
    rows = SingleRows([serial, parallel, None])
    input_ND, before_ND = draw(3, size, seed=70), draw(3, size, seed=71)
    found_ND, expected_ND = before_ND.clone(), before_ND.clone()
    compiled.add_bottleneck(found_ND, input_ND, rows, 0, 0)
    plain.add_bottleneck(expected_ND, input_ND, rows, 0, 0)
    assert_alike(found_ND, expected_ND, before_ND)
    assert torch.equal(found_ND[2], before_ND[2])


@pytest.mark.parametrize("size", [16, 32, 64, 72, 96, 128])
@pytest.mark.parametrize("groups", [1, 2, 3, 4, 5, 9])
def test_rows_attend_as_plain_operators_do(groups: int, size: int) -> None:
    angles = torch.outer(torch.arange(64), 0.5 ** torch.arange(size // 2))
    shape = HeadShape(2 * groups, 2, size, angles.cos(), angles.sin(), 1e-5)
    widths = (*shape.widths, size, size, size, size)
    found, pages = [], []
    # The last is the context's.
    positions = [0, 3, PAGE_SIZE - 1, PAGE_SIZE, 2 * PAGE_SIZE + 8, 63]
    places = [(first, 1, list(range(4 * row, 4 * row + 4))) for row, first in enumerate(positions)]
    tokens = token_rows(places, num_attending=len(places), are_alone=True)
    qkv_NE = draw(len(places), sum(shape.widths), seed=5)
    for ops in (CompiledOps(shape, widths, LIKE, 8), PlainOps(shape, widths)):
        own = Pages(num_layers=1, num_pages=24, num_kv_heads=2, head_size=size, like=LIKE)
        own.keys.copy_(draw(*own.keys.shape, seed=6))
        own.values.copy_(draw(*own.values.shape, seed=7))
        out_NK = torch.zeros(len(places), shape.widths[0], dtype=torch.bfloat16)
        ops.attend(qkv_NE, tokens, own, 0, out_NK)
        found.append(out_NK)
        pages.append(own)
    torch.testing.assert_close(pages[0].keys, pages[1].keys, rtol=2**-7, atol=1e-2)
    torch.testing.assert_close(pages[0].values, pages[1].values, rtol=0, atol=0)
    torch.testing.assert_close(found[0], found[1], rtol=2**-6, atol=3e-2)
