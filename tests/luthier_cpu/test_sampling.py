"""The likeliest token of each row, compiled and by torch, and tokens drawn by their probabilities."""

import math

import pytest
import torch

from luthier_cpu.decode.sampling import BLOCK, UNSOUND, Logits, draw, find_best


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 15, 16, 17, 1000, 49152])
def test_the_largest_number_of_each_row_is_found(size: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(size)
    logits_RV = torch.randn(5, size, generator=generator).to(dtype)
    # Of equal ones the first, which rows of bfloat16 have many of.
    expected = [row.tolist().index(max(row.tolist())) for row in logits_RV.float()]
    assert Logits.of(logits_RV).best == expected
    assert Logits.of(-logits_RV.abs() - 1).best == [
        row.tolist().index(max(row.tolist())) for row in (-logits_RV.abs() - 1).float()
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("place", [0, 7, 15, 16, 33, 36])
def test_a_row_without_a_finite_largest_number_has_none(place: int, dtype: torch.dtype) -> None:
    logits_RV = torch.zeros(6, 37, dtype=dtype)
    logits_RV[:, 5] = 1.0
    logits_RV[0, place] = math.nan
    logits_RV[1, place] = math.inf
    logits_RV[2, place] = -math.inf
    logits_RV[3] = -math.inf
    logits_RV[4] = math.nan
    logits_RV[5, place] = 2.0
    assert Logits.of(logits_RV).best == [UNSOUND, UNSOUND, 5, UNSOUND, UNSOUND, place]


def test_a_part_of_wider_rows_is_read_as_it_is() -> None:
    wide_RV = torch.arange(24.0).view(2, 12)
    assert Logits.of(wide_RV[:, :5]).best == [4, 4]
    assert Logits.of(wide_RV[:0]).best == []


def test_a_result_that_does_not_fit_is_refused() -> None:
    logits_RV = torch.zeros(2, 8)
    for out_R in (torch.zeros(3, dtype=torch.int64), torch.zeros(2), torch.zeros(4, dtype=torch.int64)[::2]):
        with pytest.raises(ValueError, match="likeliest"):
            find_best(logits_RV, out_R)
    with pytest.raises(ValueError, match="likeliest"):
        find_best(logits_RV[:, ::2], torch.zeros(2, dtype=torch.int64))


def draw_all(
    logits_RV: torch.Tensor, temperature: float, points: list[float], top_p: float = 1.0
) -> list[list[int | None]]:
    """Draw one token a row at each point."""
    rows, best = list(range(len(logits_RV))), Logits.of(logits_RV).best
    fixed = {"temperatures": [temperature] * len(rows), "top_p": [top_p] * len(rows)}
    return [draw(logits_RV, rows, best, **fixed, points=[point] * len(rows)) for point in points]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 15, 16, BLOCK - 1, BLOCK, BLOCK + 17, 5000])
def test_a_token_is_drawn_at_the_point_of_the_mass_before_it(size: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(size)
    logits_RV = (2 * torch.randn(4, size, generator=generator)).to(dtype)
    points = [0.0, *torch.rand(30, generator=generator).tolist(), 1 - 2.0**-53]
    for temperature in (1.0, 0.3, 2.5):
        ends_RV = torch.softmax(logits_RV.double() / temperature, dim=-1).cumsum(dim=-1)
        for point, drawn in zip(points, draw_all(logits_RV, temperature, points), strict=True):
            for row, token_id in enumerate(drawn):
                begin = float(ends_RV[row, token_id - 1]) if token_id else 0.0
                assert begin - 1e-6 <= point <= float(ends_RV[row, token_id]) + 1e-6


def test_what_can_not_come_is_not_drawn() -> None:
    logits_RV = torch.full((3, 2 * BLOCK + 3), -math.inf)
    logits_RV[0, 300] = logits_RV[1, 0] = logits_RV[2, -1] = 1.5
    for drawn in draw_all(logits_RV, 1.0, [0.0, 0.4, 1 - 2.0**-53]):
        assert drawn == [300, 0, 2 * BLOCK + 2]
    logits_RV[0, 10] = 1.5
    assert {drawn[0] for drawn in draw_all(logits_RV, 1.0, [0.0, 0.49, 0.51, 0.99])} == {10, 300}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 16, BLOCK + 17, 5000])
def test_a_nucleus_holds_the_fewest_likeliest_that_reach_its_mass(size: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(size)
    logits_RV = (2 * torch.randn(4, size, generator=generator)).to(dtype)
    points = [0.0, *torch.rand(30, generator=generator).tolist(), 1 - 2.0**-53]
    for temperature, top_p in ((1.0, 0.0), (1.0, 0.4), (0.3, 0.9), (0.8, 0.95)):
        mass_RV = torch.softmax(logits_RV.double() / temperature, dim=-1)
        # Of equally likely ones the first.
        sorted_RV, order_RV = mass_RV.sort(dim=-1, descending=True, stable=True)
        ends_RV = sorted_RV.cumsum(dim=-1)
        for point, drawn in zip(points, draw_all(logits_RV, temperature, points, top_p), strict=True):
            for row, token_id in enumerate(drawn):
                place = order_RV[row].tolist().index(token_id)
                begin, end = float(ends_RV[row, place] - sorted_RV[row, place]), float(ends_RV[row, place])
                assert place == 0 or begin < top_p + 1e-6
                kept = float(ends_RV[row][ends_RV[row] >= top_p - 1e-6][0])
                slack = 1e-6 + 2 * float(sorted_RV[row, place])
                assert begin - slack <= point * kept <= end + slack


def test_a_nucleus_too_wide_for_a_quick_look_is_left_to_a_slow_one() -> None:
    flat_RV = torch.zeros(2, 20_000)
    flat_RV[1, 5] = 20.0
    assert draw_all(flat_RV, 1.0, [0.5], top_p=0.9) == [[None, 5]]
    # The likely ones, the first alone, do not reach it.
    spread_RV = torch.full((1, 20_000), -11.0)
    spread_RV[0, 0] = 0.0
    assert draw_all(spread_RV, 1.0, [0.5], top_p=0.99) == [[None]]


def test_a_row_is_drawn_the_same_alone_and_on_any_number_of_threads() -> None:
    logits_RV = torch.randn(9, 3000, generator=torch.Generator().manual_seed(1)).bfloat16()
    best, points = Logits.of(logits_RV).best, torch.rand(9).tolist()
    rows, temperatures = list(range(9)), [0.5 + 0.1 * row for row in range(9)]
    top_p, before, found = [1.0, 0.9, 0.5] * 3, torch.get_num_threads(), []
    try:
        for num_threads in (1, 2, 5):
            torch.set_num_threads(num_threads)
            found.append(draw(logits_RV, rows, best, temperatures=temperatures, top_p=top_p, points=points))
    finally:
        torch.set_num_threads(before)
    alone = [
        draw(
            logits_RV,
            [row],
            [best[row]],
            temperatures=[temperatures[row]],
            top_p=[top_p[row]],
            points=[points[row]],
        )[0]
        for row in reversed(rows)
    ]
    assert found[0] == found[1] == found[2] == alone[::-1]


def test_what_is_no_row_or_no_token_is_refused() -> None:
    logits_RV = torch.zeros(2, 8)
    for rows, best in (([2], [0]), ([-1], [0]), ([0], [8]), ([0], [UNSOUND]), ([0, 1], [0])):
        with pytest.raises(ValueError, match="rows"):
            draw(logits_RV, rows, best, temperatures=[1.0], top_p=[1.0], points=[0.5])
    with pytest.raises(ValueError, match="contiguous"):
        draw(logits_RV[:, ::2], [0], [0], temperatures=[1.0], top_p=[1.0], points=[0.5])
