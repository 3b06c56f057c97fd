"""The losses by an output layer in chunks, against torch's cross entropy over full logits."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.nn import functional

from luthier.modeling import head_loss as head_loss_module
from luthier.modeling.head_loss import OutputLayer, gather_supervised, head_loss, head_token_losses
from luthier.modeling.training_protocols import Batch
from luthier.training.model.batches import collate
from tests.tiny import build_tiny_rows


def tensors(
    dtype: torch.dtype = torch.float32, num_tokens: int = 40
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return hidden_ND, weight_VD and targets_N."""
    torch.manual_seed(0)
    hidden_ND = torch.randn(num_tokens, 16, dtype=dtype).requires_grad_()
    return hidden_ND, torch.randn(50, 16, dtype=dtype).requires_grad_(), torch.randint(50, (num_tokens,))


def summed(hidden_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    return head_loss(hidden_ND, OutputLayer(weight_VD), targets_N).nll_sum


def by_token(hidden_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    return head_token_losses(hidden_ND, OutputLayer(weight_VD), targets_N).sum()


Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
both = pytest.mark.parametrize("loss", [summed, by_token])


@pytest.fixture
def batch() -> Batch:
    return collate(build_tiny_rows(6), np.arange(6), pad_id=2)


def test_value_accuracy_and_gradient_equal_cross_entropy_over_all_positions(batch):
    torch.manual_seed(0)
    hidden_BTD = torch.randn(*batch.token_ids_BT.shape, 16, requires_grad=True)
    weight_VD = torch.randn(50, 16)
    labels = batch.token_ids_BT.masked_fill(~batch.supervised_BT, -100)[:, 1:]
    logits = (hidden_BTD @ weight_VD.t())[:, :-1]
    expected = functional.cross_entropy(logits.reshape(-1, 50), labels.reshape(-1), reduction="sum")
    (expected_gradient,) = torch.autograd.grad(expected, hidden_BTD)

    hidden_ND, targets_N = gather_supervised(hidden_BTD, batch)
    found = head_loss(hidden_ND, OutputLayer(weight_VD), targets_N)
    (gradient,) = torch.autograd.grad(found.nll_sum, hidden_BTD)
    assert found.nll_sum.item() == pytest.approx(expected.item(), rel=1e-6)
    assert torch.allclose(gradient, expected_gradient, atol=1e-5)
    is_label = labels != -100
    assert found.num_right == int((logits.argmax(-1) == labels)[is_label].sum())
    assert found.num_supervised == int(is_label.sum())


def test_columns_that_nothing_depends_on_are_left_out(batch):
    rows_BT, supervised_BT = batch.token_ids_BT.clone(), batch.supervised_BT.clone()
    rows_BT[:, :5], supervised_BT[:, :5], supervised_BT[:, -3:] = 7, False, False
    supervised_BT[0, 6] = True
    rows = Batch(rows_BT, supervised_BT, batch.num_tokens)
    assert rows.num_shared == 5
    assert 6 <= rows.num_needed <= rows_BT.shape[1] - 4
    hidden_BTD = torch.randn(*rows_BT.shape, 16)
    expected, targets = gather_supervised(hidden_BTD, rows)
    found, found_targets = gather_supervised(hidden_BTD[:, : rows.num_needed], rows)
    assert torch.equal(found, expected)
    assert torch.equal(found_targets, targets)


def test_the_token_before_a_supervised_one_is_never_shared():
    rows_BT = torch.arange(30).expand(4, -1)
    supervised_BT = torch.zeros(4, 30, dtype=torch.bool)
    supervised_BT[2, 12:] = True
    assert Batch(rows_BT, supervised_BT, 120).num_shared == 11
    assert Batch(rows_BT[:1], supervised_BT[:1], 30).num_shared == 0
    assert Batch(rows_BT, torch.zeros_like(supervised_BT), 120).num_shared == 0


def test_chunks_change_nothing(monkeypatch):
    hidden_ND, weight_VD, targets_N = tensors()
    head = OutputLayer(weight_VD.detach())
    whole = head_loss(hidden_ND, head, targets_N)
    (expected,) = torch.autograd.grad(whole.nll_sum, hidden_ND)
    monkeypatch.setattr(head_loss_module, "MAX_CHUNK_LOGITS", 7 * 50)
    cut = head_loss(hidden_ND, head, targets_N)
    (found,) = torch.autograd.grad(cut.nll_sum, hidden_ND)
    assert cut.nll_sum.item() == pytest.approx(whole.nll_sum.item(), rel=1e-6)
    assert cut.num_right == whole.num_right
    assert torch.allclose(found, expected, atol=1e-6)


def test_no_gradient_is_made_where_none_is_asked_for():
    with torch.no_grad():
        loss = head_loss(torch.randn(4, 8), OutputLayer(torch.randn(9, 8)), torch.arange(4))
    assert not loss.nll_sum.requires_grad


def test_a_tied_head_adds_its_gradient_to_that_of_the_embedding():
    torch.manual_seed(0)
    weight_VD, targets_N = torch.randn(50, 16).requires_grad_(), torch.randint(50, (12,))

    def embed() -> torch.Tensor:
        return torch.tanh(functional.embedding(targets_N.flip(0), weight_VD))

    expected = functional.cross_entropy(embed() @ weight_VD.t(), targets_N, reduction="sum")
    (wanted,) = torch.autograd.grad(expected, weight_VD)
    head_loss(embed(), OutputLayer(weight_VD), targets_N).nll_sum.backward()
    assert torch.allclose(weight_VD.grad, wanted, atol=1e-5)


@both
def test_gradients_are_in_the_type_of_what_they_are_for(loss):
    hidden_ND, weight_VD, targets_N = tensors(torch.bfloat16)
    found = loss(hidden_ND, weight_VD, targets_N)
    assert found.dtype == torch.float32
    gradients = torch.autograd.grad(found, (hidden_ND, weight_VD))
    assert {gradient.dtype for gradient in gradients} == {torch.bfloat16}


@both
def test_a_frozen_head_gets_no_gradient(loss):
    hidden_ND, weight_VD, targets_N = tensors()
    weight_VD.requires_grad_(False)
    loss(hidden_ND, weight_VD, targets_N).backward()
    assert hidden_ND.grad is not None
    assert weight_VD.grad is None


def test_a_second_backward_pass_is_refused_for_gradients_are_scaled_in_place():
    hidden_ND = torch.randn(4, 8).requires_grad_()
    loss = head_loss(hidden_ND, OutputLayer(torch.randn(9, 8)), torch.arange(4)).nll_sum
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="already taken"):
        loss.backward()


def test_scoring_makes_no_gradient_even_where_the_head_is_trained(batch):
    asked: list[bool] = []

    class Watched(OutputLayer):
        def softmax_loss_(
            self, logits_NV: torch.Tensor, targets_N: torch.Tensor, *, keeps_gradient: bool
        ) -> tuple[torch.Tensor, torch.Tensor]:
            asked.append(keeps_gradient)
            return super().softmax_loss_(logits_NV, targets_N, keeps_gradient=keeps_gradient)

    hidden_BTD = torch.randn(*batch.token_ids_BT.shape, 16)
    head = Watched(torch.randn(300, 16, requires_grad=True))
    hidden_ND, targets_N = gather_supervised(hidden_BTD, batch)
    with torch.no_grad():
        scored = head_loss(hidden_ND, head, targets_N)
    trained = head_loss(hidden_ND, head, targets_N)
    assert asked == [False, True]
    assert torch.equal(scored.nll_sum, trained.nll_sum.detach())


@both
def test_a_bf16_heads_gradient_loses_nothing_by_many_chunks(loss, monkeypatch):
    hidden_ND, weight_VD, _ = tensors(torch.bfloat16, 640)
    # Few targets, so that the gradient is a sum of many like terms.
    targets_N = torch.randint(5, (640,))
    exact_VD = weight_VD.detach().double().requires_grad_()
    functional.cross_entropy(hidden_ND.double() @ exact_VD.t(), targets_N, reduction="sum").backward()

    def error() -> float:
        (found,) = torch.autograd.grad(loss(hidden_ND, weight_VD, targets_N), weight_VD)
        return float((found.double() - exact_VD.grad).norm() / exact_VD.grad.norm())

    at_once = error()
    monkeypatch.setattr(head_loss_module, "MAX_CHUNK_LOGITS", 2 * 50)
    assert error() <= 1.1 * at_once


@pytest.mark.parametrize("chunk_logits", [10_000, 7 * 50])
@pytest.mark.parametrize("is_weighted", [True, False])
def test_values_and_gradients_equal_cross_entropy(monkeypatch, chunk_logits, is_weighted):
    monkeypatch.setattr(head_loss_module, "MAX_CHUNK_LOGITS", chunk_logits)
    hidden_ND, weight_VD, targets_N = tensors()
    scale_N = torch.randn(40) if is_weighted else torch.full((40,), 1 / 3)
    expected_N = functional.cross_entropy(hidden_ND @ weight_VD.t(), targets_N, reduction="none")
    wanted = torch.autograd.grad((expected_N * scale_N).sum(), (hidden_ND, weight_VD))
    if is_weighted:
        found_N = head_token_losses(hidden_ND, OutputLayer(weight_VD), targets_N)
        assert torch.allclose(found_N, expected_N, atol=1e-5)
        loss = (found_N * scale_N).sum()
    else:
        loss = summed(hidden_ND, weight_VD, targets_N) / 3
    found = torch.autograd.grad(loss, (hidden_ND, weight_VD))
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(found, wanted, strict=True))
