"""The rate as a function of the step, and AdamW over parameters of which some have no gradient."""

import pytest
import torch

from luthier.training.optimizer import build_optimizer, learning_rate_at


def rates(num_steps: int, warmup_ratio: float = 0.1) -> list[float]:
    return [
        learning_rate_at(step, num_steps=num_steps, peak=1.0, warmup_ratio=warmup_ratio)
        for step in range(1, num_steps + 1)
    ]


def test_it_rises_to_the_peak_and_falls_to_a_tenth() -> None:
    found = rates(100)
    assert found[:10] == pytest.approx([i / 10 for i in range(1, 11)])
    assert max(found) == found[9] == 1.0
    assert found[10:] == sorted(found[10:], reverse=True)
    assert found[-1] == pytest.approx(0.1)


@pytest.mark.parametrize(("num_steps", "warmup_ratio"), [(1, 0.0), (1, 0.5), (2, 0.0), (3, 0.5)])
def test_short_runs_have_a_rate_above_zero_at_every_step(num_steps: int, warmup_ratio: float) -> None:
    assert all(0 < rate <= 1 for rate in rates(num_steps, warmup_ratio))


def test_parameters_updated_one_after_the_other_get_the_update_of_all_at_once() -> None:
    torch.manual_seed(0)
    values, gradients = [torch.randn(5) for _ in range(3)], [torch.randn(5) for _ in range(3)]
    results = []
    for groups in ([[0, 1, 2]], [[0], [1], [2]]):
        parameters = [torch.nn.Parameter(value.clone()) for value in values]
        optimizer = build_optimizer(parameters, learning_rate=0.1, weight_decay=0.1, device="cpu")
        for _ in range(2):
            for group in groups:
                for index in group:
                    parameters[index].grad = gradients[index].clone()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        results.append(torch.cat(parameters).detach())
        assert {float(state["step"]) for state in optimizer.state.values()} == {2.0}
    assert torch.equal(*results)


def test_states_are_float32() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    optimizer = build_optimizer([parameter], learning_rate=0.1, weight_decay=0.0, device="cpu")
    optimizer.step()
    assert {value.dtype for value in optimizer.state[parameter].values()} == {torch.float32}
