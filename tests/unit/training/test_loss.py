"""The loss against torch's own cross entropy over full logits."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from luthier.training.model import loss as loss_module
from luthier.training.model.batches import Batch, collate
from luthier.training.model.loss import full_logits_loss, gather_supervised, head_loss
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
    found = head_loss(hidden_ND, weight_VD, targets_N)
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
    whole = head_loss(hidden_ND.requires_grad_(), weight_VD, targets_N)
    (expected,) = torch.autograd.grad(whole.nll_sum, hidden_ND)
    monkeypatch.setattr(loss_module, "MAX_CHUNK_LOGITS", 7 * 50)
    cut = head_loss(hidden_ND, weight_VD, targets_N)
    (found,) = torch.autograd.grad(cut.nll_sum, hidden_ND)
    assert cut.nll_sum.item() == pytest.approx(whole.nll_sum.item(), rel=1e-6)
    assert cut.num_right == whole.num_right
    assert torch.allclose(found, expected, atol=1e-6)


def test_no_gradient_is_made_where_none_is_asked_for() -> None:
    with torch.no_grad():
        loss = head_loss(torch.randn(4, 8), torch.randn(9, 8), torch.arange(4))
    assert not loss.nll_sum.requires_grad


def test_logits_of_an_unusual_head_give_the_same_sums() -> None:
    torch.manual_seed(0)
    hidden_ND, weight_VD, targets_N = torch.randn(9, 8), torch.randn(20, 8), torch.randint(20, (9,))
    direct = head_loss(hidden_ND, weight_VD, targets_N)
    full = full_logits_loss(hidden_ND @ weight_VD.t(), targets_N)
    assert full.nll_sum.item() == pytest.approx(direct.nll_sum.item(), rel=1e-6)
    assert full.num_right == direct.num_right


@pytest.mark.parametrize("chunk_logits", [10_000, 7 * 50])
def test_a_trained_head_gets_the_gradient_of_cross_entropy(
    monkeypatch: pytest.MonkeyPatch, chunk_logits: int
) -> None:
    monkeypatch.setattr(loss_module, "MAX_CHUNK_LOGITS", chunk_logits)
    torch.manual_seed(0)
    hidden_ND, weight_VD = torch.randn(40, 16).requires_grad_(), torch.randn(50, 16).requires_grad_()
    targets_N = torch.randint(50, (40,))
    expected = torch.nn.functional.cross_entropy(hidden_ND @ weight_VD.t(), targets_N, reduction="sum") / 3
    wanted = torch.autograd.grad(expected, (hidden_ND, weight_VD))
    found = torch.autograd.grad(
        head_loss(hidden_ND, weight_VD, targets_N).nll_sum / 3, (hidden_ND, weight_VD)
    )
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(found, wanted, strict=True))


def test_a_tied_head_adds_its_gradient_to_that_of_the_embedding() -> None:
    torch.manual_seed(0)
    weight_VD, targets_N = torch.randn(50, 16).requires_grad_(), torch.randint(50, (12,))

    def embed() -> torch.Tensor:
        return torch.tanh(torch.nn.functional.embedding(targets_N.flip(0), weight_VD))

    expected = torch.nn.functional.cross_entropy(embed() @ weight_VD.t(), targets_N, reduction="sum")
    (wanted,) = torch.autograd.grad(expected, weight_VD)
    head_loss(embed(), weight_VD, targets_N).nll_sum.backward()
    assert weight_VD.grad is not None
    assert torch.allclose(weight_VD.grad, wanted, atol=1e-5)


def test_gradients_are_in_the_type_of_what_they_are_for() -> None:
    hidden_ND = torch.randn(6, 8, dtype=torch.bfloat16).requires_grad_()
    weight_VD = torch.randn(20, 8, dtype=torch.bfloat16).requires_grad_()
    loss = head_loss(hidden_ND, weight_VD, torch.arange(6))
    assert loss.nll_sum.dtype == torch.float32
    found = torch.autograd.grad(loss.nll_sum, (hidden_ND, weight_VD))
    assert {gradient.dtype for gradient in found} == {torch.bfloat16}


def test_a_second_backward_pass_is_refused_for_gradients_are_scaled_in_place() -> None:
    hidden_ND = torch.randn(4, 8).requires_grad_()
    loss = head_loss(hidden_ND, torch.randn(9, 8), torch.arange(4)).nll_sum
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="already taken"):
        loss.backward()


def test_scoring_makes_no_gradient_even_where_the_head_is_trained(
    batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    real = loss_module.softmax_loss_

    def watched(logits: torch.Tensor, targets: torch.Tensor, *, keeps_gradient: bool) -> object:
        asked.append(keeps_gradient)
        return real(logits, targets, keeps_gradient=keeps_gradient)

    monkeypatch.setattr(loss_module, "softmax_loss_", watched)
    hidden_BTD, weight_VD = (
        torch.randn(*batch.token_ids_BT.shape, 16),
        torch.randn(300, 16, requires_grad=True),
    )
    hidden_ND, targets_N = gather_supervised(hidden_BTD, batch)
    with torch.no_grad():
        scored = head_loss(hidden_ND, weight_VD, targets_N)
    trained = head_loss(hidden_ND, weight_VD, targets_N)
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
        (found,) = torch.autograd.grad(head_loss(hidden_ND, weight_VD, targets_N).nll_sum, weight_VD)
        return float((found.double() - exact_VD.grad).norm() / exact_VD.grad.norm())

    at_once = error()
    monkeypatch.setattr(loss_module, "MAX_CHUNK_LOGITS", 2 * 50)
    assert error() <= 1.1 * at_once
