"""The negative log-likelihood of each supervised token, for losses that weigh tokens against each other.

Such a loss knows a token's weight only once all tokens of its row are scored, so the gradients of the
output layer wait for the backward pass: those of the hidden states are scaled there, those of a trained
output weight are made there from logits that are computed again. Legend as in loss.py.
"""

from typing import Any

import torch

from luthier.modeling.kernels import softmax_loss_
from luthier.modeling.kernels.panel_products import products_with
from luthier.training.model.batches import Batch
from luthier.training.model.loss import chunks, gather_supervised
from luthier.training.model.training_model import Trainee


class _TokenLoss(torch.autograd.Function):
    """-log p(target) under softmax(hidden @ weight.T), a number a token."""

    @staticmethod
    def forward(
        context: Any, hidden_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor
    ) -> torch.Tensor:
        for_hidden, for_weight, _ = context.needs_input_grad
        gradient_ND = torch.empty_like(hidden_ND) if for_hidden else None
        products = products_with(weight_VD)
        nll_N = torch.empty(len(targets_N), dtype=torch.float32, device=hidden_ND.device)
        for part in chunks(len(targets_N), weight_VD.shape[0]):
            logits_NV = products.product(hidden_ND[part].contiguous())
            nll_N[part], _ = softmax_loss_(logits_NV, targets_N[part], keeps_gradient=for_hidden)
            if gradient_ND is not None:
                gradient_ND[part] = products.input_gradient(logits_NV)
        context.gradient_ND = gradient_ND
        context.save_for_backward(*((hidden_ND, weight_VD, targets_N) if for_weight else ()))
        return nll_N

    @staticmethod
    def backward(
        context: Any, *gradients: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        scale_N1 = gradients[0][:, None]
        hidden, context.gradient_ND = context.gradient_ND, None
        if hidden is not None:
            hidden = hidden.mul_(scale_N1.to(hidden.dtype))
        weight = None
        if context.saved_tensors:
            hidden_ND, weight_VD, targets_N = context.saved_tensors
            parts, products = chunks(len(targets_N), weight_VD.shape[0]), products_with(weight_VD)
            # As in loss.py: several chunks are summed in float32.
            sum_type = torch.float32 if len(parts) > 1 else weight_VD.dtype
            weight = torch.zeros_like(weight_VD, dtype=sum_type)
            for part in parts:
                logits_NV = products.product(hidden_ND[part].contiguous())
                softmax_loss_(logits_NV, targets_N[part], keeps_gradient=True)
                weight += logits_NV.mul_(scale_N1[part].to(logits_NV.dtype)).t() @ hidden_ND[part]
            weight = weight.to(weight_VD.dtype)
        return hidden, weight, None


def row_log_likelihoods(trainee: Trainee, batch: Batch) -> torch.Tensor:
    """Score the supervised tokens of each row.

    Returns:
        Sums of log-likelihoods, float32 [B]; differentiable unless gradients are switched off.
    """
    if trainee.head_weight_VD is None:
        logits_NV, targets_N = gather_supervised(trainee.logits(batch), batch.to(trainee.device))
        nll_N = torch.nn.functional.cross_entropy(logits_NV.float(), targets_N, reduction="none")
    else:
        hidden_ND, targets_N = trainee.supervised_hidden_states(batch)
        weight_VD = trainee.head_weight_VD
        if not torch.is_grad_enabled():
            hidden_ND, weight_VD = hidden_ND.detach(), weight_VD.detach()
        nll_N = _TokenLoss.apply(hidden_ND, weight_VD, targets_N)
    row_of_N = batch.supervised_BT[:, 1:].nonzero()[:, 0].to(nll_N.device)
    sums_B = torch.zeros(len(batch.supervised_BT), dtype=torch.float32, device=nll_N.device)
    return sums_B.index_add(0, row_of_N, -nll_N)
