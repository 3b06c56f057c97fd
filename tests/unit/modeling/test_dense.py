"""Dense weights are the weights, bit for bit; one that would not gain by lying so lies otherwise."""

import logging

import pytest
import torch

from luthier.modeling.kernels import products
from luthier.modeling.kernels.dense import UnevenWeightError, dense_bytes, lay_dense
from luthier.modeling.kernels.page_memory import take_large
from luthier.modeling.kernels.products import TiledWeight, can_tile
from luthier.modeling.packed_linear import PackedLinear

pytestmark = pytest.mark.skipif(
    not (can_tile(torch.zeros(1, 32, dtype=torch.bfloat16)) and products.lie_dense()),
    reason="the processor has none of the instructions that dense weights are read with",
)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def bits_of(weight_OK: torch.Tensor) -> torch.Tensor:
    return weight_OK.contiguous().view(torch.int16).to(torch.int64) & 0xFFFF


def read_back(memory: torch.Tensor, num_outputs: int, num_inputs: int) -> torch.Tensor:
    """Return the bits [O, K] that lie in memory, by the layout's description and in no kernel's way."""
    num_panels = -(-num_outputs // 64)
    panels = memory.view(num_panels, -1)
    upper_bytes = panels[:, :16].long()
    # Panels, steps, tiles, groups of four lines; of each codes, then lower bytes twice.
    groups = panels[:, 64:].reshape(num_panels, num_inputs // 32, 4, 4, 3, 64).long()
    found = torch.zeros(num_panels * 64, num_inputs, dtype=torch.int64)
    for half in range(2):
        codes = groups[..., 0, :] >> 4 * half & 15
        upper = torch.gather(upper_bytes, 1, codes.flatten(1)).view(codes.shape)
        numbers = upper << 8 | groups[..., 1 + half, :]
        # Of each quarter eight bytes of a line, then eight of the next; of a line 16 outputs of two inputs.
        lines = numbers.unflatten(-1, (4, 2, 4, 2))
        for second in range(2):
            line = lines[..., second, :, :].flatten(-3, -2)
            for group in range(4):
                for which in range(2):
                    first = 8 * group + 4 * half + 2 * second + which
                    outputs = line[:, :, :, group, :, which].permute(0, 2, 3, 1).reshape(num_panels * 64, -1)
                    found[:, first::32] = outputs
    return found[:num_outputs]


@pytest.mark.parametrize(
    ("num_outputs", "num_inputs"), [(1, 32), (64, 32), (65, 64), (100, 96), (200, 576), (960, 1536)]
)
def test_every_bit_is_kept(num_outputs: int, num_inputs: int) -> None:
    weight_OK = draw(num_outputs, num_inputs)
    weight_OK[0, :3] = torch.tensor([0.0, -0.0, 2.0**-100])
    memory = take_large(dense_bytes(num_outputs, num_inputs))
    try:
        exceptions = lay_dense(weight_OK, memory)
    except UnevenWeightError:
        # Of 32 numbers three strange ones are too many.
        assert weight_OK.numel() < 1024
        return
    found_OK = read_back(memory, num_outputs, num_inputs)
    counts = memory.view(-(-num_outputs // 64), -1)[:, 24:40].contiguous().view(torch.int64)
    starts = counts.sum(1).cumsum(0)
    assert int(starts[-1]) == len(exceptions)
    for number, one in enumerate(exceptions.tolist()):
        panel = int(torch.searchsorted(starts, number, right=True))
        output, k = 64 * panel + (one >> 16 & 0xFFFF), one >> 32
        assert found_OK[output, k] == 0
        found_OK[output, k] = one & 0xFFFF
    assert torch.equal(found_OK, bits_of(weight_OK))


def test_memory_is_three_quarters() -> None:
    assert dense_bytes(576, 576) / (576 * 576 * 2) < 0.752


@pytest.mark.parametrize("num_rows", [1, 3, 8, 9, 16, 17, 40, 70])
def test_products_have_their_exceptions_in_them(num_rows: int) -> None:
    """Exceptions of great weight in every place of a panel, so that none can be missed."""
    weight_OK = draw(200, 576) * 0.01
    places = torch.arange(0, weight_OK.numel(), 263)
    weight_OK.view(-1)[places] = (draw(len(places), seed=3).abs() + 1) * 2.0**12
    tiled = TiledWeight(weight_OK)
    x_NK = draw(num_rows, 576, seed=1)
    found_NO = tiled.times(x_NK, torch.full((num_rows, 200), float("nan"), dtype=torch.bfloat16))
    expected_NO = (x_NK.double() @ weight_OK.double().t()).bfloat16()
    torch.testing.assert_close(found_NO, expected_NO, rtol=2**-7, atol=0.5)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
@pytest.mark.parametrize("num_rows", [1, 8, 13, 40])
def test_weights_that_are_no_numbers_stay_visible_in_their_output(wrong: float, num_rows: int) -> None:
    weight_OK = draw(64, 64)
    weight_OK[5, 7] = wrong
    found_NO = TiledWeight(weight_OK).times(
        draw(num_rows, 64, seed=1).abs() + 1, torch.zeros(num_rows, 64, dtype=torch.bfloat16)
    )
    assert not torch.isfinite(found_NO[:, 5]).any()
    others = torch.arange(64) != 5
    assert torch.isfinite(found_NO[:, others]).all()


def test_uneven_weights_lie_otherwise_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    scales = 2.0 ** torch.arange(-60, 60, 120 / 64)
    weight_OK = (draw(64, 64).float() * scales).bfloat16()
    with pytest.raises(UnevenWeightError, match="upper bytes of their own"):
        TiledWeight(weight_OK)
    with caplog.at_level(logging.WARNING):
        linear = PackedLinear(weight_OK)
    assert linear.tiled is None
    assert "stays as it is" in caplog.text
    x_NK = draw(3, 64, seed=1)
    torch.testing.assert_close(linear(x_NK), x_NK @ weight_OK.t(), rtol=2**-6, atol=1e-2)


def test_what_is_no_such_weight_or_room_is_refused() -> None:
    room = take_large(dense_bytes(64, 64))
    crooked = take_large(dense_bytes(64, 64) + 64)[8 : 8 + dense_bytes(64, 64)]
    for weight_OK, memory in (
        (draw(64, 64).float(), room),
        (draw(64, 48), room),
        (draw(64, 64), room[:-64]),
        (draw(64, 64), crooked),
    ):
        with pytest.raises(ValueError, match="laid dense"):
            lay_dense(weight_OK, memory)
