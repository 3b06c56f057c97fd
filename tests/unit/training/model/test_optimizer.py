"""Rates by step, and AdamW over bf16 parameters: bit for bit torch's own on float32 masters, of any shape."""

import pytest
import torch

from luthier.methods import Attached
from luthier.modeling.load import iterate_weights, load_base
from luthier.training.model import optimizer as split_adamw
from luthier.training.model.optimizer import (
    SplitAdamW,
    _join,
    _split,
    build_optimizer,
    learning_rate_at,
    start_master_weights,
)
from tests.tiny import build_tiny_base


def rates(num_steps: int, warmup_ratio: float = 0.1) -> list[float]:
    return [
        learning_rate_at(step, num_steps=num_steps, peak=1.0, warmup_ratio=warmup_ratio)
        for step in range(1, num_steps + 1)
    ]


def test_it_rises_to_the_peak_and_falls_to_a_tenth():
    found = rates(100)
    assert found[:10] == pytest.approx([i / 10 for i in range(1, 11)])
    assert max(found) == found[9] == 1.0
    assert found[10:] == sorted(found[10:], reverse=True)
    assert found[-1] == pytest.approx(0.1)


@pytest.mark.parametrize(("num_steps", "warmup_ratio"), [(1, 0.0), (1, 0.5), (2, 0.0), (3, 0.5)])
def test_short_runs_have_a_rate_above_zero_at_every_step(num_steps, warmup_ratio):
    assert all(0 < rate <= 1 for rate in rates(num_steps, warmup_ratio))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_are_float32_whatever_the_parameters_are(dtype):
    parameter = torch.nn.Parameter(torch.ones(3, dtype=dtype))
    parameter.grad = torch.ones(3, dtype=dtype)
    optimizer = build_optimizer([parameter], learning_rate=0.1, weight_decay=0.0, device="cpu")
    assert isinstance(optimizer, SplitAdamW) == (dtype == torch.bfloat16)
    optimizer.step()
    state = optimizer.state[parameter]
    assert {state[name].dtype for name in ("step", "exp_avg", "exp_avg_sq")} == {torch.float32}


def test_splitting_and_joining_gives_every_number_back():
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (200_000,), generator=generator).to(torch.int32)
    numbers = bits.view(torch.float32)
    # With ties of both signs, subnormal numbers, zeros, and the largest that bf16 does not round to infinity.
    odd = torch.tensor([0x3F808000, 0x3F818000, -0x407F8000, 1, 0, -(2**31), 0x7F7F7FFF]).to(torch.int32)
    numbers = torch.cat([numbers[torch.isfinite(numbers.bfloat16())], odd.view(torch.float32)])
    high, low = torch.empty_like(numbers, dtype=torch.bfloat16), torch.empty_like(numbers, dtype=torch.int16)
    bits = numbers.view(torch.int32)
    _split(bits.clone(), high, low, torch.empty_like(bits))
    assert torch.equal(_join(high, low, torch.empty_like(bits)), bits)
    rounded = numbers.bfloat16()
    is_tie = (bits & 0xFFFF) == 0x8000
    assert torch.equal(high[~is_tie], rounded[~is_tie])
    assert is_tie.sum() >= 3


def build(values: list[torch.Tensor]) -> tuple[list[torch.nn.Parameter], SplitAdamW]:
    parameters = [torch.nn.Parameter(value) for value in values]
    return parameters, SplitAdamW(parameters, learning_rate=1e-3, weight_decay=0.1)


@pytest.mark.parametrize("block", [256 * 1024, 64, 1])
def test_masters_go_the_way_of_torchs_adamw_in_float32(block, monkeypatch):
    monkeypatch.setitem(split_adamw._BLOCK_NUMBERS, "cpu", block)
    torch.manual_seed(0)
    values = [torch.randn(shape).bfloat16() for shape in ((7, 33), (5,), (), (3, 2, 4))] + [torch.randn(6)]
    # A parameter may be a part of a wider tensor.
    values.append(torch.randn(9, 40).bfloat16()[:, 3:20])
    parameters, optimizer = build([value.clone() for value in values[:-1]] + [values[-1]])
    masters = [torch.nn.Parameter(value.float().contiguous()) for value in values]
    reference = torch.optim.AdamW(masters, lr=1e-3, weight_decay=0.1, fused=True)
    for _ in range(5):
        for parameter, master in zip(parameters, masters, strict=True):
            parameter.grad = torch.randn(master.shape).to(parameter.dtype)
            master.grad = parameter.grad.float() * 0.25
        optimizer.step(gradient_scale=0.25)
        reference.step()
        assert all(parameter.grad is None for parameter in parameters)
    for parameter, master in zip(parameters, masters, strict=True):
        assert torch.allclose(optimizer.master(parameter), master, rtol=1e-6, atol=0)
        gap = (parameter.float() - optimizer.master(parameter)).abs()
        assert (gap <= optimizer.master(parameter).abs() * 2**-8).all()


def test_gradients_may_be_float32_sums():
    (parameter,), optimizer = build([torch.ones(4).bfloat16()])
    parameter.grad_dtype = torch.float32
    parameter.grad = torch.full((4,), 1 + 2**-20)
    optimizer.step()
    assert torch.equal(optimizer.state[parameter]["exp_avg"], torch.full((4,), 1 + 2**-20) * (1 - 0.9))


def test_parameters_without_a_gradient_stay():
    (one, other), optimizer = build([torch.ones(4).bfloat16(), torch.ones(4).bfloat16()])
    one.grad = torch.ones(4).bfloat16()
    for _ in range(9):
        optimizer.step()
    assert torch.equal(other, torch.ones(4).bfloat16())
    assert not optimizer.state[other]


def test_parameters_of_other_types_are_refused():
    with pytest.raises(ValueError, match="bf16"):
        build([torch.ones(2, dtype=torch.float16)])


def test_masters_that_begin_as_the_base_s_numbers_go_the_way_of_float32_training():
    torch.manual_seed(0)
    exact = torch.randn(40, 50)
    (parameter,), optimizer = build([exact.bfloat16()])
    assert optimizer.set_master(parameter, exact)
    assert torch.equal(parameter, exact.bfloat16())
    assert torch.equal(optimizer.master(parameter), exact)
    master = torch.nn.Parameter(exact.clone())
    reference = torch.optim.AdamW([master], lr=1e-3, weight_decay=0.1, fused=True)
    for _ in range(3):
        parameter.grad = torch.randn(exact.shape).bfloat16()
        master.grad = parameter.grad.float()
        optimizer.step()
        reference.step()
    assert torch.allclose(optimizer.master(parameter), master, rtol=1e-6, atol=0)
    # The first small updates are seen at once, in the numbers that they bring over a border.
    assert (parameter != exact.bfloat16()).float().mean() > 0.1


def test_a_tie_that_was_rounded_down_costs_its_master_one_unit():
    exact = torch.tensor([0x3F808000, 0x3F818000, -0x407F8000]).to(torch.int32).view(torch.float32)
    (parameter,), optimizer = build([exact.bfloat16()])
    assert optimizer.set_master(parameter, exact)
    assert torch.equal(parameter, exact.bfloat16())
    gap = (optimizer.master(parameter).view(torch.int32) - exact.view(torch.int32)).abs()
    assert gap.max() <= 1


def test_a_master_that_is_not_the_parameter_s_is_refused():
    (parameter, single), optimizer = build([torch.ones(4).bfloat16(), torch.ones(4)])
    assert not optimizer.set_master(parameter, torch.full((4,), 1.5))
    assert not optimizer.set_master(parameter, torch.ones(2, 2))
    assert not optimizer.set_master(single, torch.ones(4))
    assert torch.equal(optimizer.master(parameter), torch.ones(4))


@pytest.mark.parametrize("num_frozen", [0, 5])
def test_trained_weights_have_the_base_s_own_numbers_as_masters(tmp_path, num_frozen):
    base = build_tiny_base(tmp_path / "base")
    causal_lm = load_base(base, dtype=torch.bfloat16, device="cpu")
    trained = dict(list(causal_lm.named_parameters())[num_frozen:])
    for weight in trained.values():
        weight.requires_grad_()
    optimizer = SplitAdamW(list(trained.values()), learning_rate=1e-4, weight_decay=0.0)
    assert start_master_weights(optimizer, Attached(causal_lm, causal_lm), base) == len(trained)
    exact = dict(iterate_weights(base))
    assert all(torch.equal(optimizer.master(weight), exact[name]) for name, weight in trained.items())


def test_weights_of_another_model_are_not_taken(tmp_path):
    causal_lm = load_base(build_tiny_base(tmp_path / "base"), dtype=torch.bfloat16, device="cpu")
    weights = [weight.requires_grad_() for weight in causal_lm.parameters() if weight.ndim == 2]
    optimizer = SplitAdamW(weights, learning_rate=1e-4, weight_decay=0.0)
    other = build_tiny_base(tmp_path / "other", seed=1)
    assert start_master_weights(optimizer, Attached(causal_lm, causal_lm), other) == 0
    assert torch.equal(optimizer.master(weights[0]), weights[0].float())
