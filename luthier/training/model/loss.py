"""The loss: negative log-likelihood of supervised tokens only, in float32, without a full set of logits.

Hidden states of the positions that predict a supervised token are gathered first, so the output layer
runs on those alone, in chunks whose logits are dropped at once. The gradients with respect to the hidden
states and, where it is trained, to the output weight are made in the forward pass, from the logits while
they are there. Legend: B rows, T tokens, N supervised tokens, D hidden size, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch

from luthier.modeling.kernels import softmax_loss_
from luthier.modeling.kernels.panel_products import products_with
from luthier.training.model.batches import Batch

# Logits held at a time, in numbers: 12 Mi of them are 48 MiB in float32. Products of fewer rows are slower.
MAX_CHUNK_LOGITS = 12 * 1024 * 1024


@dataclass(frozen=True)
class Loss:
    """Sums over a batch's supervised tokens; `nll_sum` is differentiable."""

    nll_sum: torch.Tensor
    num_right: int
    num_supervised: int


class _HeadLoss(torch.autograd.Function):
    """Sum of -log p(target) under softmax(hidden @ weight.T)."""

    @staticmethod
    def forward(
        context: Any, hidden_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        nll_sum = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        num_right = torch.zeros((), dtype=torch.int64, device=hidden_ND.device)
        for_hidden, for_weight, _ = context.needs_input_grad
        gradient_ND = torch.empty_like(hidden_ND) if for_hidden else None
        parts = chunks(hidden_ND.shape[0], weight_VD.shape[0])
        # Several chunks are summed in float32: in bf16 each sum would round what was summed before.
        sum_type = torch.float32 if len(parts) > 1 else weight_VD.dtype
        gradient_VD = torch.zeros_like(weight_VD, dtype=sum_type) if for_weight else None
        products = products_with(weight_VD)
        for part in parts:
            logits_NV = products.product(hidden_ND[part].contiguous())
            nll_N, is_right_N = softmax_loss_(
                logits_NV, targets_N[part], keeps_gradient=for_hidden or for_weight
            )
            nll_sum += nll_N.sum()
            num_right += is_right_N.sum()
            # From here on the logits are their own gradient.
            if gradient_ND is not None:
                gradient_ND[part] = products.input_gradient(logits_NV)
            if gradient_VD is not None:
                gradient_VD += logits_NV.t() @ hidden_ND[part]
        # Kept by hand, for they are scaled in place: the weight's is as large as the weight.
        context.gradients = (gradient_ND, None if gradient_VD is None else gradient_VD.to(weight_VD.dtype))
        context.mark_non_differentiable(num_right)
        return nll_sum, num_right

    @staticmethod
    def backward(
        context: Any, *gradients: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        made, context.gradients = context.gradients, None
        if made is None:
            raise RuntimeError("The gradients of this loss were already taken.")
        hidden, weight = [None if one is None else one.mul_(gradients[0].to(one.dtype)) for one in made]
        return hidden, weight, None


def chunks(num_tokens: int, vocabulary_size: int) -> list[slice]:
    """Cut tokens into parts of like size, none of which has more logits than are held at a time."""
    most = max(1, MAX_CHUNK_LOGITS // vocabulary_size)
    size = -(-num_tokens // max(1, -(-num_tokens // most)))
    return [slice(start, start + size) for start in range(0, num_tokens, size)] if num_tokens else []


def gather_supervised(outputs_BTD: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Pick the outputs that predict a supervised token.

    Args:
        outputs_BTD: the model's output before its output layer, or its logits, up to the last column that is
            needed, or more.

    Returns:
        outputs_ND and targets_N: position t predicts token t + 1.
    """
    following = slice(1, 1 + outputs_BTD.shape[1])
    is_target_BT = batch.supervised_BT[:, following]
    outputs_ND = outputs_BTD[:, : is_target_BT.shape[1]][is_target_BT]
    return outputs_ND, batch.token_ids_BT[:, following][is_target_BT]


def head_loss(hidden_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor) -> Loss:
    """Score hidden states against their targets through a bias-free output layer.

    Args:
        weight_VD: the output layer's weight; it gets a gradient if it requires one, in its own type.
        targets_N: int64, the tokens to be predicted.

    Returns:
        The sums, float32; one backward pass through them is possible.
    """
    if not torch.is_grad_enabled():
        # A function is told what requires gradients, not whether anybody will ask for them.
        hidden_ND, weight_VD = hidden_ND.detach(), weight_VD.detach()
    nll_sum, num_right = _HeadLoss.apply(hidden_ND, weight_VD, targets_N)
    return Loss(nll_sum, int(num_right), targets_N.shape[0])


def full_logits_loss(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> Loss:
    """Score logits as a model with an unusual output layer gives them (softcap, bias, scale)."""
    nll_sum = torch.nn.functional.cross_entropy(logits_NV.float(), targets_N, reduction="sum")
    return Loss(nll_sum, int((logits_NV.argmax(dim=-1) == targets_N).sum()), targets_N.shape[0])
