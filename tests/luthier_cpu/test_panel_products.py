"""Products by panels are those of float64, whatever the sizes, ranks and threads."""

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch

from luthier_cpu.codegen import kernels
from luthier_cpu.codegen import openmp as _threads
from luthier_cpu.gemm import panel_products
from luthier_cpu.gemm.panel_products import (
    MOST_PAIRS,
    PanelProducts,
    Part,
    can_multiply,
    has_panels,
)
from luthier_cpu.training.accelerator import CpuOutputLayer

pytestmark = pytest.mark.skipif(not panel_products._may_multiply(), reason="no products of pairs here")

# Of the largest number: bfloat16 rounds by 2^-9 of a number, and u is rounded once before.
_ROUNDING = 2**-7


@pytest.fixture(autouse=True)
def _num_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


class Case:
    """One fused layer, rows, and what its products should be in float64.

    Args:
        num_rows: N.
        num_inputs: D.
        sizes: outputs of each part.
        ranks: of each part, 0 for none.
    """

    def __init__(
        self, num_rows: int, num_inputs: int, sizes: tuple[int, ...], ranks: tuple[int, ...]
    ) -> None:
        self.parts = [
            Part(size, random(rank, num_inputs), random(size, rank), 0.5) if rank else Part(size)
            for size, rank in zip(sizes, ranks, strict=True)
        ]
        self.weight_OD = random(sum(sizes), num_inputs).bfloat16()
        self.x_ND = random(num_rows, num_inputs).bfloat16()
        self.y_NO = random(num_rows, sum(sizes)).bfloat16()
        self.residual_NO = random(num_rows, sum(sizes), seed=1).bfloat16()

    def found(self) -> list[torch.Tensor]:
        """Return the products: forward with a residual, backward, gradients of every a and b."""
        made = PanelProducts(self.weight_OD, self.parts)
        u_NU, gradient_NU = made.low_rank(self.x_ND), made.low_rank_gradient(self.y_NO)
        outputs = [
            made.product(self.x_ND, u_NU, self.residual_NO),
            made.input_gradient(self.y_NO, gradient_NU),
        ]
        if u_NU is not None and gradient_NU is not None:
            outputs += made.update_gradients(self.y_NO, self.x_ND, u_NU, gradient_NU)
        return outputs

    def expected(self) -> list[torch.Tensor]:
        """Return the same in float64, in one product with the updated weight."""
        x, y, residual = (one.double() for one in (self.x_ND, self.y_NO, self.residual_NO))
        ends = [0]
        for part in self.parts:
            ends.append(ends[-1] + part.num_outputs)
        whole, gradients = self.weight_OD.double(), []
        for part, (begin, end) in zip(self.parts, pairwise(ends), strict=True):
            if part.a_RD is None or part.b_OR is None:
                continue
            a, b, own = part.a_RD.double(), part.b_OR.double(), y[:, begin:end]
            whole[begin:end] += part.scale * b @ a
            gradients += [part.scale * (own @ b).t() @ x, part.scale * own.t() @ (x @ a.t())]
        return [x @ whole.t() + residual, y @ whole, *gradients]


def assert_close(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        gap = (one.double() - other).abs().max()
        assert gap <= _ROUNDING * other.abs().max()


@pytest.mark.parametrize("num_rows", [1, 2, 7, 8, 9, 15, 16, 17, 31, 50])
@pytest.mark.parametrize(
    ("sizes", "ranks"),
    [
        ((64, 32, 32), (16, 16, 16)),
        ((96, 160), (1, 0)),
        ((32,), (0,)),
        ((160, 32), (5, 33)),
        ((96, 96, 32), (0, 64, 3)),
    ],
)
def test_products_are_those_of_float64(num_rows: int, sizes: tuple[int, ...], ranks: tuple[int, ...]) -> None:
    case = Case(num_rows, 96, sizes, ranks)
    assert_close(case.found(), case.expected())


@pytest.mark.parametrize("num_rows", [3, 21])
def test_sums_over_more_than_is_near_the_processor_continue(num_rows: int) -> None:
    case = Case(num_rows, 2 * MOST_PAIRS + 64, (32, 2 * MOST_PAIRS + 32), (4, 8))
    assert_close(case.found(), case.expected())


@pytest.mark.parametrize("num_rows", [1, 20, 200])
def test_threads_and_what_lay_in_memory_change_no_bit(num_rows: int) -> None:
    case = Case(num_rows, 160, (96, 64), (5, 16))
    torch.set_num_threads(1)
    alone = case.found()
    for num_threads in (1, 2, 7):
        torch.set_num_threads(num_threads)
        case.found()
        # All ones are no number, neither as bfloat16 nor as float32.
        panel_products._ROOM.held.fill_(255)
        assert all(map(torch.equal, case.found(), alone))


@pytest.mark.parametrize("has_pool", [True, False])
def test_a_long_sum_is_the_same_for_a_team_of_any_size(
    monkeypatch: pytest.MonkeyPatch, *, has_pool: bool
) -> None:
    case = Case(150, 2 * MOST_PAIRS + 64, (96, 2 * MOST_PAIRS + 32), (4, 0))
    torch.set_num_threads(1)
    alone = case.found()
    if not has_pool:
        # A team of one where seven were asked for.
        monkeypatch.setattr(_threads, "_find_pool", lambda: None)
    torch.set_num_threads(7)
    case.found()
    panel_products._ROOM.held.fill_(255)
    assert all(map(torch.equal, case.found(), alone))


def test_what_is_no_number_is_seen_and_stays_in_its_row() -> None:
    case = Case(20, 96, (64, 32), (4, 4))
    case.x_ND[11, 5], case.y_NO[3, 70] = float("nan"), float("inf")
    product, gradient, *of_parameters = case.found()
    assert product.isnan().any(dim=1).nonzero().flatten().tolist() == [11]
    assert (~gradient.isfinite()).any(dim=1).nonzero().flatten().tolist() == [3]
    assert not any(one.isfinite().all() for one in of_parameters)


def test_no_rows_have_no_products_and_no_gradients() -> None:
    case = Case(0, 96, (64, 32), (4, 4))
    product, gradient, *of_parameters = case.found()
    assert (product.shape, gradient.shape) == ((0, 96), (0, 96))
    assert all(not one.any() for one in of_parameters)


def test_updates_are_read_where_they_are_now() -> None:
    case = Case(9, 96, (64,), (4,))
    made = PanelProducts(case.weight_OD, case.parts)
    (part,) = case.parts
    assert part.a_RD is not None
    assert part.b_OR is not None
    part.a_RD.mul_(3)
    part.b_OR.data = part.b_OR * 2
    found = made.product(case.x_ND, made.low_rank(case.x_ND), case.residual_NO)
    assert_close([found], case.expected()[:1])


def test_what_does_not_fit_is_refused() -> None:
    weight_OD = torch.zeros(64, 96, dtype=torch.bfloat16)
    a_RD, b_OR = torch.zeros(4, 96), torch.zeros(64, 4)
    for weight, part in (
        (weight_OD.float(), Part(64)),
        (torch.zeros(64, 100, dtype=torch.bfloat16), Part(64)),
        (weight_OD, Part(60)),
        (weight_OD.t(), Part(96)),
        (weight_OD.to("meta"), Part(64)),
        (weight_OD, Part(64, a_RD.bfloat16(), b_OR)),
        (weight_OD, Part(64, a_RD, torch.zeros(4, 64).t())),
        (weight_OD, Part(96)),
        (weight_OD, Part(32)),
        (weight_OD[:0], Part(0)),
        (weight_OD, Part(64, a_RD)),
        (weight_OD, Part(64, a_RD[:, :64].contiguous(), b_OR)),
        (weight_OD, Part(64, a_RD, b_OR[:32])),
        (weight_OD, Part(64, a_RD, torch.zeros(64, 5))),
    ):
        assert not can_multiply(weight, [part])
        with pytest.raises(ValueError, match="can't be made by panels"):
            PanelProducts(weight, [part])
    made, x_ND = PanelProducts(weight_OD, [Part(64, a_RD, b_OR)]), torch.zeros(3, 96, dtype=torch.bfloat16)
    u_NU = made.low_rank(x_ND)
    assert u_NU is not None
    for rows, middle, residual in (
        (x_ND.float(), u_NU, None),
        (x_ND[:, ::2], u_NU, None),
        (x_ND[:, :32], u_NU, None),
        (x_ND, u_NU[:2], None),
        (x_ND, u_NU[:, :8], None),
        (x_ND, None, None),
        (x_ND, u_NU, torch.zeros(3, 96, dtype=torch.bfloat16)),
        (x_ND, u_NU, torch.zeros(2, 64, dtype=torch.bfloat16)),
    ):
        with pytest.raises(ValueError, match=r"(?i)product"):
            made.product(rows, middle, residual)
    b_OR.data = b_OR.bfloat16()
    with pytest.raises(ValueError, match="contiguous float32"):
        made.low_rank(x_ND)


def test_other_products_run_where_these_come_out_wrong(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    weight_OD, x_ND = random(64, 96).bfloat16(), random(5, 96).bfloat16()
    has_panels.cache_clear()
    try:
        for gap in (0.5, float("nan")):
            monkeypatch.setattr(panel_products, "_largest_gap", lambda _, gap=gap: gap)
            assert not can_multiply(weight_OD, [Part(64)])
            assert "other products run, slower" in caplog.text
            assert torch.equal(CpuOutputLayer(weight_OD).product(x_ND), torch.mm(x_ND, weight_OD.t()))
            has_panels.cache_clear()
    finally:
        has_panels.cache_clear()
    monkeypatch.undo()
    assert can_multiply(weight_OD, [Part(64)])
    monkeypatch.setattr(kernels, "is_compiled", lambda _: False)
    assert not can_multiply(weight_OD, [Part(64)])
