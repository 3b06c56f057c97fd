"""Masters of bf16 weights begin at what the base's files hold."""

from pathlib import Path

import pytest
import torch

from luthier.methods import Attached
from luthier.modeling.load import iterate_weights, load_base
from luthier.training.model.optimizer import SplitAdamW, start_master_weights
from tests.tiny import build_tiny_base


@pytest.mark.parametrize("num_frozen", [0, 5])
def test_trained_weights_have_the_base_s_own_numbers_as_masters(tmp_path: Path, num_frozen: int) -> None:
    base = build_tiny_base(tmp_path / "base")
    causal_lm = load_base(base, dtype=torch.bfloat16, device="cpu")
    trained = dict(list(causal_lm.named_parameters())[num_frozen:])
    for weight in trained.values():
        weight.requires_grad_()
    optimizer = SplitAdamW(list(trained.values()), learning_rate=1e-4, weight_decay=0.0)
    assert start_master_weights(optimizer, Attached(causal_lm, causal_lm), base) == len(trained)
    exact = dict(iterate_weights(base))
    assert all(torch.equal(optimizer.master(weight), exact[name]) for name, weight in trained.items())


def test_weights_of_another_model_are_not_taken(tmp_path: Path) -> None:
    causal_lm = load_base(build_tiny_base(tmp_path / "base"), dtype=torch.bfloat16, device="cpu")
    weights = [weight.requires_grad_() for weight in causal_lm.parameters() if weight.ndim == 2]
    optimizer = SplitAdamW(weights, learning_rate=1e-4, weight_decay=0.0)
    other = build_tiny_base(tmp_path / "other", seed=1)
    assert start_master_weights(optimizer, Attached(causal_lm, causal_lm), other) == 0
    assert torch.equal(optimizer.master(weights[0]), weights[0].float())
