"""The rate as a function of the step."""

import pytest

from luthier.training.optimizer import learning_rate_at


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
