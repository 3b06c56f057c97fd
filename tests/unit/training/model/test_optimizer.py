"""The rate as a function of the step, and which optimizer parameters get."""

import pytest
import torch

from luthier.training.model.optimizer import SplitAdamW, build_optimizer, learning_rate_at


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_are_float32_whatever_the_parameters_are(dtype: torch.dtype) -> None:
    parameter = torch.nn.Parameter(torch.ones(3, dtype=dtype))
    parameter.grad = torch.ones(3, dtype=dtype)
    optimizer = build_optimizer([parameter], learning_rate=0.1, weight_decay=0.0, device="cpu")
    assert isinstance(optimizer, SplitAdamW) == (dtype == torch.bfloat16)
    optimizer.step()
    state = optimizer.state[parameter]
    assert {state[name].dtype for name in ("step", "exp_avg", "exp_avg_sq")} == {torch.float32}
