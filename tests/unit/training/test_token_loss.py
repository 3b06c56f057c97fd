"""Scores of single tokens, and their gradients under weights of their own, against torch's cross entropy."""

import pytest
import torch

from luthier.training.model import loss as loss_module
from luthier.training.model.token_loss import _TokenLoss


def tensors(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return hidden_ND, weight_VD and targets_N."""
    torch.manual_seed(0)
    hidden_ND = torch.randn(40, 16, dtype=dtype).requires_grad_()
    return hidden_ND, torch.randn(50, 16, dtype=dtype).requires_grad_(), torch.randint(50, (40,))


@pytest.mark.parametrize("chunk_logits", [10_000, 7 * 50])
def test_values_and_weighted_gradients_equal_cross_entropy(
    monkeypatch: pytest.MonkeyPatch, chunk_logits: int
) -> None:
    monkeypatch.setattr(loss_module, "MAX_CHUNK_LOGITS", chunk_logits)
    hidden_ND, weight_VD, targets_N = tensors()
    scale_N = torch.randn(40)
    expected_N = torch.nn.functional.cross_entropy(hidden_ND @ weight_VD.t(), targets_N, reduction="none")
    wanted = torch.autograd.grad((expected_N * scale_N).sum(), (hidden_ND, weight_VD))
    found_N = _TokenLoss.apply(hidden_ND, weight_VD, targets_N)
    found = torch.autograd.grad((found_N * scale_N).sum(), (hidden_ND, weight_VD))
    assert torch.allclose(found_N, expected_N, atol=1e-5)
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(found, wanted, strict=True))


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden_ND, weight_VD, targets_N = tensors()
    weight_VD.requires_grad_(False)
    _TokenLoss.apply(hidden_ND, weight_VD, targets_N).sum().backward()
    assert hidden_ND.grad is not None
    assert weight_VD.grad is None


def test_gradients_are_in_the_type_of_what_they_are_for() -> None:
    hidden_ND, weight_VD, targets_N = tensors(torch.bfloat16)
    nll_N = _TokenLoss.apply(hidden_ND, weight_VD, targets_N)
    assert nll_N.dtype == torch.float32
    found = torch.autograd.grad(nll_N.sum(), (hidden_ND, weight_VD))
    assert {gradient.dtype for gradient in found} == {torch.bfloat16}


def test_a_bf16_heads_gradient_loses_nothing_by_many_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    hidden_ND, weight_VD = torch.randn(640, 16).bfloat16(), torch.randn(50, 16).bfloat16().requires_grad_()
    # Few targets, so that the gradient is a sum of many like terms.
    targets_N = torch.randint(5, (640,))
    exact_VD = weight_VD.detach().double().requires_grad_()
    logits_NV = hidden_ND.double() @ exact_VD.t()
    torch.nn.functional.cross_entropy(logits_NV, targets_N, reduction="sum").backward()
    exact = exact_VD.grad
    assert exact is not None

    def error() -> float:
        nll_N = _TokenLoss.apply(hidden_ND, weight_VD, targets_N)
        (found,) = torch.autograd.grad(nll_N.sum(), weight_VD)
        return float((found.double() - exact).norm() / exact.norm())

    at_once = error()
    monkeypatch.setattr(loss_module, "MAX_CHUNK_LOGITS", 2 * 50)
    assert error() <= 1.1 * at_once
