"""The likeliest token of each row, compiled and by torch."""

import math

import pytest
import torch

from luthier.modeling import kernels
from luthier.modeling.kernels.best import UNSOUND, find_best
from luthier.modeling.logits import Logits


@pytest.fixture(params=["compiled", "plain"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "plain":
        monkeypatch.setattr(kernels, "is_compiled", lambda _: False)
    elif not kernels.is_compiled(torch.empty(1)):
        pytest.skip("numba is not installed")
    return str(request.param)


@pytest.mark.usefixtures("way")
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


@pytest.mark.usefixtures("way")
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


@pytest.mark.usefixtures("way")
def test_a_part_of_wider_rows_is_read_as_it_is() -> None:
    wide_RV = torch.arange(24.0).view(2, 12)
    assert Logits.of(wide_RV[:, :5]).best == [4, 4]
    assert Logits.of(wide_RV[:0]).best == []


@pytest.mark.usefixtures("way")
def test_a_result_that_does_not_fit_is_refused() -> None:
    logits_RV = torch.zeros(2, 8)
    for out_R in (torch.zeros(3, dtype=torch.int64), torch.zeros(2), torch.zeros(4, dtype=torch.int64)[::2]):
        with pytest.raises(ValueError, match="likeliest"):
            find_best(logits_RV, out_R)
    with pytest.raises(ValueError, match="likeliest"):
        find_best(logits_RV[:, ::2], torch.zeros(2, dtype=torch.int64))
