"""Dense weights are the weights, bit for bit; one that would not gain by lying so lies otherwise."""

import logging

import pytest
import torch

from luthier.modeling.kernels import products
from luthier.modeling.kernels.dense import UnevenWeightError, dense_bytes, lay_dense
from luthier.modeling.kernels.page_memory import take_large
from luthier.modeling.kernels.products import TiledWeight, can_tile
from luthier.modeling.packed_linear import PackedLinear
from luthier.modeling.packed_llama import PackedLlama
from luthier.modeling.packed_work import Stretch
from tests.unit.modeling.small_llama import small_llama

pytestmark = pytest.mark.skipif(
    not (can_tile(torch.zeros(1, 32, dtype=torch.bfloat16)) and products.lie_dense()),
    reason="the processor has none of the instructions that dense weights are read with",
)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def draw_even(num_outputs: int, num_inputs: int) -> torch.Tensor:
    """Draw a weight whose upper bytes are fifteen, about equally frequent: 14 exponents of either sign, and
    one more that has one sign alone."""
    generator = torch.Generator().manual_seed(0)
    shape = (num_outputs, num_inputs)
    which = torch.randint(0, 15, shape, generator=generator)
    exponents = -13 + 2 * (which // 2) + torch.randint(0, 2, shape, generator=generator)
    signs = torch.where(which % 2 == 0, 1.0, -1.0)
    fractions = 1 + torch.randint(0, 128, shape, generator=generator) / 128
    return (signs * fractions * 2.0**exponents).bfloat16()


def with_exceptions(weight_OK: torch.Tensor, step: int) -> tuple[torch.Tensor, int]:
    """Put great numbers of other upper bytes into places that are a step apart; return how many."""
    places = torch.arange(3, weight_OK.numel(), step)
    great = torch.where(torch.arange(len(places)) % 2 == 0, 2.0**9, -(2.0**11))
    changed = weight_OK.clone()
    changed.view(-1)[places] = (great * (1 + torch.arange(len(places)) % 5 / 8)).bfloat16()
    return changed, len(places)


def read_back(memory: torch.Tensor, num_inputs: int) -> torch.Tensor:
    """Return the bits [panels * 64, K] in memory, by the layout's description and in no kernel's way."""
    panels = memory.view(-1, 64 + num_inputs * 96)
    num_panels = len(panels)
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
    return found


@pytest.mark.usefixtures("num_threads")
@pytest.mark.parametrize(
    ("num_outputs", "num_inputs"), [(64, 64), (65, 64), (100, 96), (200, 576), (960, 1536)]
)
def test_every_bit_is_kept(num_outputs: int, num_inputs: int) -> None:
    weight_OK, num_great = with_exceptions(draw_even(num_outputs, num_inputs), 263)
    weight_OK[-1, :4] = torch.tensor([0.0, -0.0, 2.0**-100, 2.0**-130])
    # What was there before must not show through.
    memory = take_large(dense_bytes(num_outputs, num_inputs)).fill_(0xFF)
    exceptions = lay_dense(weight_OK, memory)
    # One of those may lie where the strange ones do, and a few be coded in a last panel of few numbers.
    assert len(exceptions) >= num_great - 4
    found_OK = read_back(memory, num_inputs)
    counts = memory.view(-1, 64 + num_inputs * 96)[:, 24:40].contiguous().view(torch.int64)
    ends = counts.sum(1).cumsum(0)
    assert int(ends[-1]) == len(exceptions)
    for number, one in enumerate(exceptions.tolist()):
        panel = int(torch.searchsorted(ends, number, right=True))
        place, k = one >> 16 & 0xFFFF, one >> 32
        is_first = number - int(ends[panel] - counts[panel].sum()) < int(counts[panel, 0])
        assert (place < 32) == is_first
        assert found_OK[64 * panel + place, k] == 0
        found_OK[64 * panel + place, k] = one & 0xFFFF
    bits_OK = weight_OK.view(torch.int16).to(torch.int64) & 0xFFFF
    assert torch.equal(found_OK[:num_outputs], bits_OK)
    assert not found_OK[num_outputs:].any()


def test_memory_is_three_quarters() -> None:
    assert dense_bytes(576, 576) / (576 * 576 * 2) < 0.752


@pytest.mark.usefixtures("num_threads")
@pytest.mark.parametrize("num_rows", [1, 2, 3, 8, 9, 16, 17, 40, 70])
@pytest.mark.parametrize("num_outputs", [200, 576])
def test_products_have_their_exceptions_in_them(num_outputs: int, num_rows: int) -> None:
    """Exceptions in every tile and of either input of a pair, of such weight that each shows if it lacks."""
    weight_OK, num_exceptions = with_exceptions(draw_even(num_outputs, 576), 263)
    tiled = TiledWeight(weight_OK)
    assert len(tiled.exceptions_E) == num_exceptions
    x_NK = draw(num_rows, 576, seed=1)
    found_NO = tiled.times(x_NK, torch.full((num_rows, num_outputs), float("nan"), dtype=torch.bfloat16))
    expected_NO = (x_NK.double() @ weight_OK.double().t()).bfloat16()
    torch.testing.assert_close(found_NO, expected_NO, rtol=2**-7, atol=0.05)
    # Were one not there, its output would be another.
    tiled.exceptions_E[len(tiled.exceptions_E) // 2] &= ~0xFFFF
    other_NO = tiled.times(x_NK, torch.zeros_like(found_NO))
    assert bool(((other_NO - found_NO).abs() > 0.05).any())


@pytest.mark.parametrize("num_rows", [1, 2, 8, 9, 16, 17, 40])
def test_products_are_the_same_to_the_bit_on_any_number_of_threads(num_rows: int) -> None:
    tiled, before = TiledWeight(with_exceptions(draw_even(576, 96), 263)[0]), torch.get_num_threads()
    x_NK, found = draw(num_rows, 96, seed=1), []
    try:
        for count in (1, 2, 3, 5, 7):
            torch.set_num_threads(count)
            found.append(tiled.times(x_NK, torch.zeros(num_rows, 576, dtype=torch.bfloat16)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, found[0]) for one in found)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
@pytest.mark.parametrize("num_rows", [1, 8, 13, 40])
@pytest.mark.parametrize("is_coded", [False, True])
def test_weights_that_are_no_numbers_stay_visible_in_their_output(
    wrong: float, num_rows: int, is_coded: bool
) -> None:
    weight_OK = draw(64, 64).sign() if is_coded else draw_even(64, 64)
    weight_OK[5, 7] = wrong
    tiled = TiledWeight(weight_OK)
    assert len(tiled.exceptions_E) == int(not is_coded)
    x_NK = draw(num_rows, 64, seed=1).abs() + 1
    found_NO = tiled.times(x_NK, torch.zeros(num_rows, 64, dtype=torch.bfloat16))
    assert not torch.isfinite(found_NO[:, 5]).any()
    assert torch.isfinite(found_NO[:, torch.arange(64) != 5]).all()


@pytest.mark.parametrize("num_rows", [1, 8, 13, 40])
def test_an_infinite_input_leaves_other_outputs_than_an_exceptions_infinite(num_rows: int) -> None:
    weight_OK = draw_even(64, 64)
    weight_OK[5, 7] = 2.0**60
    tiled = TiledWeight(weight_OK)
    assert len(tiled.exceptions_E) == 1
    x_NK = draw(num_rows, 64, seed=1)
    x_NK[:, 7] = float("inf")
    found_NO = tiled.times(x_NK, torch.zeros(num_rows, 64, dtype=torch.bfloat16))
    others = torch.arange(64) != 5
    assert torch.equal(
        found_NO[:, others], (weight_OK[:, 7].sign() * float("inf"))[others].expand(num_rows, -1)
    )
    assert not torch.isfinite(found_NO[:, 5]).any()


def uneven(num_outputs: int, num_inputs: int) -> torch.Tensor:
    """Return a weight whose upper bytes are some sixty, one as frequent as the other."""
    exponents = torch.arange(num_inputs) % 60 - 30
    return (draw(num_outputs, num_inputs).float() * 2.0**exponents).bfloat16()


def test_uneven_weights_lie_otherwise_and_nothing_was_written() -> None:
    weight_OK = uneven(64, 64)
    memory = take_large(dense_bytes(64, 64)).fill_(0x55)
    with pytest.raises(UnevenWeightError, match="upper bytes of their own"):
        TiledWeight(weight_OK, memory)
    assert bool((memory == 0x55).all())
    linear, x_NK = PackedLinear(weight_OK), draw(3, 64, seed=1)
    assert linear.tiled is None
    torch.testing.assert_close(linear(x_NK), x_NK @ weight_OK.t(), rtol=2**-6, atol=1e-2)
    # One panel of many may not be like that either: one thread would have all of its exceptions.
    with pytest.raises(UnevenWeightError):
        TiledWeight(torch.cat([draw(64 * 100, 64), weight_OK]))


def test_a_base_with_an_uneven_weight_answers_as_before_and_the_log_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    causal_lm = small_llama(torch.bfloat16)
    # Wide, and of no great effect.
    down = causal_lm.model.layers[0].mlp.down_proj.weight
    down.data = uneven(64, 96).float().clamp(-0.02, 0.02).bfloat16()
    down.data[:, 40:] = (down.data[:, 40:].float() * 2.0**-40).bfloat16()
    with caplog.at_level(logging.WARNING):
        packed = PackedLlama(causal_lm, num_pages=8)
    assert "1 of 9 weights are too uneven" in caplog.text
    ids = [5, 6, 7, 8, 9]
    found = packed.step([Stretch(ids[:4], 0, [1], wants_all_logits=True)]).held_RV.float()
    last = packed.step([Stretch(ids[4:], 4, [1])]).held_RV.float()
    with torch.no_grad():
        expected = causal_lm(torch.tensor([ids])).logits[0].float()
    torch.testing.assert_close(torch.cat([found, last]), expected, rtol=0.05, atol=0.02)


def test_what_is_no_such_weight_or_room_is_refused() -> None:
    num_bytes = dense_bytes(64, 64)
    room = take_large(num_bytes)
    for weight_OK, memory in (
        (draw(64, 64).float(), room),
        (draw(64, 48), take_large(dense_bytes(64, 48))),
        (draw(64, 64), room[:-64]),
        (draw(64, 64), take_large(num_bytes + 64)[8 : 8 + num_bytes]),
        (draw(64, 64), take_large(2 * num_bytes)[::2]),
        (draw(64, 64), room.view(2, -1)),
        (draw(64, 64).to("meta"), room),
    ):
        with pytest.raises(ValueError, match="laid dense"):
            lay_dense(weight_OK, memory)
