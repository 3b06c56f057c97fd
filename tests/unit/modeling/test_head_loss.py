"""The losses by an output layer in chunks, against torch's cross entropy over full logits."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from luthier.modeling import head_loss as head_loss_module
from luthier.modeling.head_loss import OutputLayer, gather_supervised, head_loss, head_token_losses
from luthier.modeling.training_protocols import Batch
from luthier.training.model.batches import collate
from tests.tiny import build_tiny_rows


@pytest.fixture
def batch() -> Batch:
    return collate(build_tiny_rows(6), np.arange(6), pad_id=2)


def test_value_accuracy_and_gradient_equal_cross_entropy_over_all_positions(batch: Batch) -> None:
    torch.manual_seed(0)
    hidden_BTD = torch.randn(*batch.token_ids_BT.shape, 16, requires_grad=True)
    weight_VD = torch.randn(50, 16)
    labels = batch.token_ids_BT.masked_fill(~batch.supervised_BT, -100)[:, 1:]
    logits = (hidden_BTD @ weight_VD.t())[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.reshape(-1, 50), labels.reshape(-1), reduction="sum")
    (expected_gradient,) = torch.autograd.grad(expected, hidden_BTD)

    hidden_ND, targets_N = gather_supervised(hidden_BTD, batch)
    found = head_loss(hidden_ND, OutputLayer(weight_VD), targets_N)
    (gradient,) = torch.autograd.grad(found.nll_sum, hidden_BTD)
    assert found.nll_sum.item() == pytest.approx(expected.item(), rel=1e-6)
    assert torch.allclose(gradient, expected_gradient, atol=1e-5)
    is_label = labels != -100
    assert found.num_right == int((logits.argmax(-1) == labels)[is_label].sum())
    assert found.num_supervised == int(is_label.sum())


def test_columns_that_nothing_depends_on_are_left_out(batch: Batch) -> None:
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


def test_the_token_before_a_supervised_one_is_never_shared() -> None:
    rows_BT = torch.arange(30).expand(4, -1)
    supervised_BT = torch.zeros(4, 30, dtype=torch.bool)
    supervised_BT[2, 12:] = True
    assert Batch(rows_BT, supervised_BT, 120).num_shared == 11
    assert Batch(rows_BT[:1], supervised_BT[:1], 30).num_shared == 0
    assert Batch(rows_BT, torch.zeros_like(supervised_BT), 120).num_shared == 0


def test_chunks_change_nothing(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    hidden_ND, weight_VD = torch.randn(40, 16), torch.randn(50, 16)
    targets_N = torch.randint(50, (40,))
    whole = head_loss(hidden_ND.requires_grad_(), OutputLayer(weight_VD), targets_N)
    (expected,) = torch.autograd.grad(whole.nll_sum, hidden_ND)
    monkeypatch.setattr(head_loss_module, "MAX_CHUNK_LOGITS", 7 * 50)
    cut = head_loss(hidden_ND, OutputLayer(weight_VD), targets_N)
    (found,) = torch.autograd.grad(cut.nll_sum, hidden_ND)
    assert cut.nll_sum.item() == pytest.approx(whole.nll_sum.item(), rel=1e-6)
    assert cut.num_right == whole.num_right
    assert torch.allclose(found, expected, atol=1e-6)


def test_no_gradient_is_made_where_none_is_asked_for() -> None:
    with torch.no_grad():
        loss = head_loss(torch.randn(4, 8), OutputLayer(torch.randn(9, 8)), torch.arange(4))
    assert not loss.nll_sum.requires_grad


@pytest.mark.parametrize("chunk_logits", [10_000, 7 * 50])
def test_a_trained_head_gets_the_gradient_of_cross_entropy(
    monkeypatch: pytest.MonkeyPatch, chunk_logits: int
) -> None:
    monkeypatch.setattr(head_loss_module, "MAX_CHUNK_LOGITS", chunk_logits)
    torch.manual_seed(0)
    hidden_ND, weight_VD = torch.randn(40, 16).requires_grad_(), torch.randn(50, 16).requires_grad_()
    targets_N = torch.randint(50, (40,))
    expected = torch.nn.functional.cross_entropy(hidden_ND @ weight_VD.t(), targets_N, reduction="sum") / 3
    wanted = torch.autograd.grad(expected, (hidden_ND, weight_VD))
    found = torch.autograd.grad(
        head_loss(hidden_ND, OutputLayer(weight_VD), targets_N).nll_sum / 3, (hidden_ND, weight_VD)
    )
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(found, wanted, strict=True))


def test_a_tied_head_adds_its_gradient_to_that_of_the_embedding() -> None:
    torch.manual_seed(0)
    weight_VD, targets_N = torch.randn(50, 16).requires_grad_(), torch.randint(50, (12,))

    def embed() -> torch.Tensor:
        return torch.tanh(torch.nn.functional.embedding(targets_N.flip(0), weight_VD))

    expected = torch.nn.functional.cross_entropy(embed() @ weight_VD.t(), targets_N, reduction="sum")
    (wanted,) = torch.autograd.grad(expected, weight_VD)
    head_loss(embed(), OutputLayer(weight_VD), targets_N).nll_sum.backward()
    assert weight_VD.grad is not None
    assert torch.allclose(weight_VD.grad, wanted, atol=1e-5)


def test_gradients_are_in_the_type_of_what_they_are_for() -> None:
    hidden_ND = torch.randn(6, 8, dtype=torch.bfloat16).requires_grad_()
    weight_VD = torch.randn(20, 8, dtype=torch.bfloat16).requires_grad_()
    loss = head_loss(hidden_ND, OutputLayer(weight_VD), torch.arange(6))
    assert loss.nll_sum.dtype == torch.float32
    found = torch.autograd.grad(loss.nll_sum, (hidden_ND, weight_VD))
    assert {gradient.dtype for gradient in found} == {torch.bfloat16}


def test_a_second_backward_pass_is_refused_for_gradients_are_scaled_in_place() -> None:
    hidden_ND = torch.randn(4, 8).requires_grad_()
    loss = head_loss(hidden_ND, OutputLayer(torch.randn(9, 8)), torch.arange(4)).nll_sum
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="already taken"):
        loss.backward()


def test_scoring_makes_no_gradient_even_where_the_head_is_trained(batch: Batch) -> None:
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


def test_a_bf16_heads_gradient_loses_nothing_by_many_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    hidden_ND, weight_VD = torch.randn(640, 16).bfloat16(), torch.randn(50, 16).bfloat16().requires_grad_()
    targets_N = torch.randint(5, (640,))
    exact_VD = weight_VD.detach().double().requires_grad_()
    logits_NV = hidden_ND.double() @ exact_VD.t()
    functional.cross_entropy(logits_NV, targets_N, reduction="sum").backward()
    assert exact_VD.grad is not None

    def error() -> float:
        (found,) = torch.autograd.grad(
            head_loss(hidden_ND, OutputLayer(weight_VD), targets_N).nll_sum, weight_VD
        )
        return float((found.double() - exact_VD.grad).norm() / exact_VD.grad.norm())

    at_once = error()
    monkeypatch.setattr(head_loss_module, "MAX_CHUNK_LOGITS", 2 * 50)
    assert error() <= 1.1 * at_once


def tensors(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return hidden_ND, weight_VD and targets_N."""
    torch.manual_seed(0)
    hidden_ND = torch.randn(40, 16, dtype=dtype).requires_grad_()
    return hidden_ND, torch.randn(50, 16, dtype=dtype).requires_grad_(), torch.randint(50, (40,))


@pytest.mark.parametrize("chunk_logits", [10_000, 7 * 50])
def test_values_and_weighted_gradients_equal_cross_entropy(
    monkeypatch: pytest.MonkeyPatch, chunk_logits: int
) -> None:
    monkeypatch.setattr(head_loss_module, "MAX_CHUNK_LOGITS", chunk_logits)
    hidden_ND, weight_VD, targets_N = tensors()
    scale_N = torch.randn(40)
    expected_N = torch.nn.functional.cross_entropy(hidden_ND @ weight_VD.t(), targets_N, reduction="none")
    wanted = torch.autograd.grad((expected_N * scale_N).sum(), (hidden_ND, weight_VD))
    found_N = head_token_losses(hidden_ND, OutputLayer(weight_VD), targets_N)
    found = torch.autograd.grad((found_N * scale_N).sum(), (hidden_ND, weight_VD))
    assert torch.allclose(found_N, expected_N, atol=1e-5)
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(found, wanted, strict=True))


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden_ND, weight_VD, targets_N = tensors()
    weight_VD.requires_grad_(False)
    head_token_losses(hidden_ND, OutputLayer(weight_VD), targets_N).sum().backward()
    assert hidden_ND.grad is not None
    assert weight_VD.grad is None


def test_gradients_of_token_losses_are_in_the_type_of_their_tensors() -> None:
    hidden_ND, weight_VD, targets_N = tensors(torch.bfloat16)
    nll_N = head_token_losses(hidden_ND, OutputLayer(weight_VD), targets_N)
    assert nll_N.dtype == torch.float32
    found = torch.autograd.grad(nll_N.sum(), (hidden_ND, weight_VD))
    assert {gradient.dtype for gradient in found} == {torch.bfloat16}


def test_a_bf16_heads_gradient_of_token_losses_sums_many_chunks_exactly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
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
        nll_N = head_token_losses(hidden_ND, OutputLayer(weight_VD), targets_N)
        (found,) = torch.autograd.grad(nll_N.sum(), weight_VD)
        return float((found.double() - exact).norm() / exact.norm())

    at_once = error()
    monkeypatch.setattr(head_loss_module, "MAX_CHUNK_LOGITS", 2 * 50)
    assert error() <= 1.1 * at_once
