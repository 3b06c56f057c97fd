"""Products in the layout of tiles are the plain ones; where a processor has none, other products run."""

import pytest
import torch

from luthier_cpu.codegen.page_memory import take_large
from luthier_cpu.decode.linear import PackedLinear
from luthier_cpu.gemm import products
from luthier_cpu.gemm.products import TiledWeight, can_tile, tiled_bytes

needs_tiles = pytest.mark.skipif(
    not can_tile(torch.zeros(1, 32, dtype=torch.bfloat16)), reason="the processor has no products of pairs"
)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@needs_tiles
@pytest.mark.usefixtures("num_threads")
@pytest.mark.parametrize(
    ("num_outputs", "num_inputs"), [(64, 32), (1, 64), (100, 96), (64, 128), (96, 160), (200, 576)]
)
def test_products_of_any_number_of_rows_are_the_plain_ones(num_outputs: int, num_inputs: int) -> None:
    weight_OK = draw(num_outputs, num_inputs)
    tiled = TiledWeight(weight_OK)
    for num_rows in (*range(1, 18), 31, 32, 33, 48, 49, 64, 81):
        x_NK = draw(num_rows, num_inputs, seed=num_rows)
        out_NO = torch.full((num_rows, num_outputs), float("nan"), dtype=torch.bfloat16)
        expected_NO = (x_NK.double() @ weight_OK.double().t()).bfloat16()
        found_NO = tiled.times(x_NK, out_NO)
        # One unit in the last place of a bfloat16.
        torch.testing.assert_close(found_NO, expected_NO, rtol=2**-7, atol=1e-3)


@needs_tiles
@pytest.mark.usefixtures("num_threads")
@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(64, 32), (100, 96), (200, 576), (64, 32 * 800)])
def test_what_is_asked_for_meanwhile_changes_no_product(num_outputs: int, num_inputs: int) -> None:
    """Regions of any length, among them none and those of no adapter."""
    tiled = TiledWeight(draw(num_outputs, num_inputs))
    region = draw(70_000)
    for num_rows in (1, 8, 9, 13, 16, 17):
        x_NK = draw(num_rows, num_inputs, seed=num_rows)
        plain_NO, found_NO = (torch.zeros(num_rows, num_outputs, dtype=torch.bfloat16) for _ in range(2))
        lengths = [0 if row % 3 == 0 else 8_000 * (row % 17) for row in range(num_rows)]
        tables = [torch.tensor([7, region.data_ptr(), length]) for length in lengths]
        addresses_N = torch.tensor([0 if row % 5 == 4 else one.data_ptr() for row, one in enumerate(tables)])
        tiled.times(x_NK, plain_NO)
        tiled.times(x_NK, found_NO, (addresses_N.data_ptr(), 1))
        assert torch.equal(found_NO, plain_NO)


@needs_tiles
@pytest.mark.parametrize("num_rows", [1, 8, 13, 20, 40])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_no_number_stays_visible_in_its_row_alone(num_rows: int, wrong: float) -> None:
    tiled, x_NK = TiledWeight(draw(64, 64)), draw(num_rows, 64, seed=1)
    x_NK[-1, 3] = wrong
    found_NO = tiled.times(x_NK, torch.zeros(num_rows, 64, dtype=torch.bfloat16))
    assert not torch.isfinite(found_NO[-1]).any()
    assert torch.isfinite(found_NO[:-1]).all()


@needs_tiles
def test_weights_are_in_memory_that_is_given_and_nowhere_else() -> None:
    weight_OK = draw(100, 96)
    memory = take_large(3 * tiled_bytes(weight_OK)).zero_()
    before, own, after = memory.split(tiled_bytes(weight_OK))
    TiledWeight(weight_OK, own)
    assert own.any()
    assert not before.any()
    assert not after.any()


@needs_tiles
def test_rows_that_are_not_what_the_kernel_reads_are_refused() -> None:
    tiled, good, out = TiledWeight(draw(64, 64)), draw(2, 64), torch.zeros(2, 64, dtype=torch.bfloat16)
    for x_NK, out_NO in ((draw(2, 32), out), (good.float(), out), (good, out[:1]), (draw(64, 2).t(), out)):
        with pytest.raises(ValueError, match="contiguous bfloat16"):
            tiled.times(x_NK, out_NO)


def test_other_types_shapes_and_processors_take_other_products(monkeypatch: pytest.MonkeyPatch) -> None:
    assert PackedLinear(draw(64, 64).float()).tiled is None
    assert PackedLinear(draw(64, 48)).tiled is None
    monkeypatch.setattr(products, "has_tiles", lambda: False)
    weight_OK, x_NK = draw(64, 64), draw(3, 64, seed=1)
    linear = PackedLinear(weight_OK)
    assert linear.tiled is None
    torch.testing.assert_close(linear(x_NK), x_NK @ weight_OK.t(), rtol=2**-6, atol=1e-2)


@needs_tiles
@pytest.mark.parametrize("gap", [0.5, float("nan")])
def test_other_products_run_where_these_come_out_wrong(
    gap: float, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(products, "_largest_gap", lambda _: gap)
    products.has_tiles.cache_clear()
    try:
        assert not can_tile(torch.zeros(1, 32, dtype=torch.bfloat16))
        assert "other products run, slower" in caplog.text
    finally:
        products.has_tiles.cache_clear()
