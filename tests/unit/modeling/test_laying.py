"""Low-rank updates laid out where a step reads them."""

import pytest
import torch
from torch.nn import functional

from luthier.modeling import kernels
from luthier.modeling.kernels.blocks import lie_in_pairs, of_blocks, shape_of_blocks, times_blocks, to_blocks
from luthier.modeling.kernels.laying import (
    Update,
    WideUpdate,
    facts_of,
    lay_facts,
    lay_low_ranks,
    widen_low_ranks,
)
from luthier.modeling.kernels.served_rows import Described, LowRankSite


def _go(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let updates be laid out by kernels, or by plain operators."""
    if way == "plain":
        monkeypatch.setattr(kernels, "is_compiled", lambda _: False)
    elif not kernels.is_compiled(torch.empty(1)):
        pytest.skip("numba is not installed")


def _update(rank: int, filled: int, num_outputs: int, dtype: torch.dtype, source: torch.dtype) -> Update:
    generator = torch.Generator().manual_seed(rank)
    a_RK = torch.randn(rank, 24, generator=generator).to(source)
    b_OR = torch.randn(num_outputs, rank, generator=generator).to(source)
    are_pairs = lie_in_pairs(torch.empty(0, dtype=dtype))
    shapes = (filled, 24), shape_of_blocks(filled, num_outputs, are_pairs=are_pairs)
    # What was there before must not show through.
    return Update(a_RK, b_OR, 0.3, *(torch.full(shape, 7.0, dtype=dtype) for shape in shapes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("source", "way"),
    # What files hold in another type goes by the plain operators in any case.
    [(torch.float32, "compiled"), (torch.float32, "plain"), (torch.bfloat16, "plain")],
)
def test_numbers_come_to_their_places_rounded_once(
    dtype: torch.dtype, source: torch.dtype, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _go(way, monkeypatch)
    updates = [
        _update(*sizes, dtype, source) for sizes in ((4, 4, 64), (5, 8, 100), (1, 4, 3), (16, 16, 192))
    ]
    lay_low_ranks(updates)
    for update in updates:
        rank, filled, num_outputs = len(update.a_RK), len(update.a_FK), len(update.b_OR)
        missing_ranks, missing = filled - rank, -num_outputs % 64
        expected_FK = functional.pad(update.a_RK.to(dtype), (0, 0, 0, missing_ranks))
        scaled_RO = (update.b_OR.float() * torch.tensor(0.3)).t().to(dtype)
        expected_FO = functional.pad(scaled_RO, (0, missing, 0, missing_ranks))
        assert torch.equal(update.a_FK, expected_FK)
        assert torch.equal(of_blocks(update.blocks, num_outputs + missing), expected_FO)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_not_finite_is_told_wherever_it_stands(dtype: torch.dtype, wrong: float) -> None:
    """In whole vectors and in what is left of them, of inputs, outputs and ranks."""
    if not kernels.is_compiled(torch.empty(1)):
        pytest.skip("numba is not installed")
    for rank, filled, num_outputs in ((1, 4, 3), (5, 8, 100), (17, 20, 16)):
        update = _update(rank, filled, num_outputs, dtype, torch.float32)
        assert lay_facts(torch.tensor([facts_of(update)]), dtype)
        for tensor in (update.a_RK, update.b_OR):
            numbers = tensor.view(-1)
            for place in range(0, len(numbers), 1 if len(numbers) < 200 else 7):
                before = numbers[place].item()
                numbers[place] = wrong
                assert not lay_facts(torch.tensor([facts_of(update)]), dtype)
                numbers[place] = before


def test_an_update_that_does_not_fit_its_place_is_refused_and_nothing_is_written() -> None:
    good = _update(4, 4, 64, torch.float32, torch.float32)
    for bad in (
        good._replace(b_OR=torch.zeros(65, 4)),
        good._replace(b_OR=torch.zeros(64, 3)),
        good._replace(a_FK=torch.zeros(3, 24)),
        good._replace(a_FK=torch.zeros(4, 25)),
        good._replace(blocks=torch.zeros(2, 4, 32)),
        good._replace(blocks=torch.zeros(1, 4, 64, dtype=torch.bfloat16)),
    ):
        with pytest.raises(ValueError, match="does not fit"):
            lay_low_ranks([good, bad])
    assert bool((good.a_FK == 7).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_rows", "num_columns"), [(4, 64), (8, 100), (4, 3)])
def test_a_matrix_comes_out_of_its_blocks_as_it_went_in(
    dtype: torch.dtype, num_rows: int, num_columns: int
) -> None:
    rows = torch.randn(num_rows, num_columns, generator=torch.Generator().manual_seed(0)).to(dtype)
    blocks, x_NR = to_blocks(rows), torch.ones(2, num_rows, dtype=dtype)
    assert blocks.shape == shape_of_blocks(num_rows, num_columns, are_pairs=lie_in_pairs(rows))
    assert torch.equal(of_blocks(blocks, num_columns), rows)
    torch.testing.assert_close(times_blocks(x_NR, blocks, num_columns), x_NR @ rows)


def test_blocks_that_the_kernels_would_read_in_another_order_are_refused() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        are_pairs = lie_in_pairs(torch.empty(0, dtype=dtype))
        wrong = torch.zeros(shape_of_blocks(4, 64, are_pairs=not are_pairs), dtype=dtype)
        with pytest.raises(ValueError, match="other blocks"):
            Described([[LowRankSite(torch.zeros(4, 32, dtype=dtype), wrong), *[None] * 6]], [[None, None]])


def _wide_update(rank: int, num_outputs: int, dtype: torch.dtype, source: torch.dtype) -> WideUpdate:
    """Return an update whose place is columns of a weight that holds sevens."""
    generator = torch.Generator().manual_seed(rank)
    a_RK = torch.randn(rank, 24, generator=generator).to(source)
    b_OR = torch.randn(num_outputs, rank, generator=generator).to(source)
    weight_OK = torch.full((num_outputs + 2, 40), 7.0, dtype=dtype)
    return WideUpdate(
        a_RK, b_OR, 0.3, torch.full((rank, 24), 7.0, dtype=dtype), weight_OK[1:-1, 40 - rank - 1 : -1]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("source", "way"), [(torch.float32, "compiled"), (torch.float32, "plain"), (torch.bfloat16, "plain")]
)
def test_what_is_trained_comes_beside_its_weight_and_nowhere_else(
    dtype: torch.dtype, source: torch.dtype, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _go(way, monkeypatch)
    updates = [_wide_update(*sizes, dtype, source) for sizes in ((4, 64), (5, 100), (1, 3), (16, 1))]
    widen_low_ranks(updates)
    for update in updates:
        assert torch.equal(update.a_place_RK, update.a_RK.to(dtype))
        assert torch.equal(update.b_place_OR, (update.b_OR * update.scale).to(dtype))
        whole = update.b_place_OR._base
        assert whole is not None
        assert int((whole != 7).sum()) <= update.b_OR.numel()


def test_an_update_that_does_not_fit_beside_its_weight_is_refused_and_nothing_is_written() -> None:
    good = _wide_update(4, 64, torch.float32, torch.float32)
    for bad in (
        good._replace(b_OR=torch.zeros(65, 4)),
        good._replace(a_RK=torch.zeros(4, 25)),
        good._replace(a_RK=torch.zeros(3, 24), a_place_RK=torch.zeros(3, 24)),
        good._replace(b_place_OR=torch.zeros(64, 4, dtype=torch.bfloat16)),
        good._replace(b_place_OR=torch.zeros(64, 40, device="meta")[:, :4]),
    ):
        with pytest.raises(ValueError, match="does not fit"):
            widen_low_ranks([good, bad])
    assert bool((good.a_place_RK == 7).all())
