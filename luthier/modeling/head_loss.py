"""Cross-entropy of supervised tokens through a bias-free output layer, in chunks of logits.

The hidden states of the positions that predict a supervised token are gathered first, so that the output
layer runs on those alone, in chunks whose logits are dropped at once.

Legend: B rows, T tokens, N supervised tokens, D hidden size, V vocabulary.
"""

from typing import Any

import torch

from luthier.modeling.training_protocols import Batch, Loss

# Logits held at a time, in numbers: 12 Mi of them are 48 MiB in float32. Products of fewer rows are slower.
MAX_CHUNK_LOGITS = 12 * 1024 * 1024


class OutputLayer:
    """An output layer's products and softmax in torch's operators; accelerators override how, not what.

    Args:
        weight_VD: gets a gradient in its own type where it requires one.
    """

    def __init__(self, weight_VD: torch.Tensor) -> None:
        self.weight_VD = weight_VD

    def product(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """Return logits_NV in a new tensor."""
        return torch.mm(hidden_ND, self.weight_VD.t())

    def input_gradient(self, gradient_NV: torch.Tensor) -> torch.Tensor:
        """Return the gradient of the hidden states, [N, D]."""
        return torch.mm(gradient_NV, self.weight_VD)

    def softmax_loss_(
        self, logits_NV: torch.Tensor, targets_N: torch.Tensor, *, keeps_gradient: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Score logits against targets, and turn them in place into their own gradient.

        Args:
            logits_NV: overwritten by softmax(logits) minus the target's one-hot row, when `keeps_gradient`.

        Returns:
            nll_N float32, and is_right_N bool: whether the target is the likeliest, of equals the first.
        """
        targets_N1 = targets_N[:, None]
        is_right_N = logits_NV.argmax(dim=-1) == targets_N
        wide_NV = logits_NV.float()
        normaliser_N1 = torch.logsumexp(wide_NV, dim=-1, keepdim=True)
        nll_N = (normaliser_N1 - wide_NV.gather(1, targets_N1))[:, 0]
        if keeps_gradient:
            if wide_NV is logits_NV:
                wide_NV = logits_NV.clone()
            probabilities_NV = wide_NV.sub_(normaliser_N1).exp_()
            probabilities_NV.scatter_add_(1, targets_N1, torch.full_like(normaliser_N1, -1.0))
            logits_NV.copy_(probabilities_NV)
        return nll_N, is_right_N


def head_loss(hidden_ND: torch.Tensor, head: OutputLayer, targets_N: torch.Tensor) -> Loss:
    """Score hidden states against their targets; one backward pass through the loss is possible.

    Args:
        targets_N: int64, the tokens to be predicted.
    """
    nll_sum, num_right = _HeadLoss.apply(*_inputs(hidden_ND, head), targets_N, head)
    return Loss(nll_sum, int(num_right), targets_N.shape[0])


def head_token_losses(hidden_ND: torch.Tensor, head: OutputLayer, targets_N: torch.Tensor) -> torch.Tensor:
    """Return the negative log-likelihood of each target, float32 [N], for losses that weigh tokens.

    Such a loss knows a token's weight only once all tokens of its row are scored. So the gradients of the
    hidden states are scaled in the backward pass, and a trained output weight's are made there, from logits
    that are computed again.
    """
    return _TokenLosses.apply(*_inputs(hidden_ND, head), targets_N, head)


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


def _inputs(hidden_ND: torch.Tensor, head: OutputLayer) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what autograd sees; detached without gradients, which its functions would prepare for anyway."""
    if torch.is_grad_enabled():
        return hidden_ND, head.weight_VD
    return hidden_ND.detach(), head.weight_VD.detach()


def _chunks(num_tokens: int, vocabulary_size: int) -> list[slice]:
    """Cut tokens into chunks of about equal size, each of at most `MAX_CHUNK_LOGITS` logits."""
    most = max(1, MAX_CHUNK_LOGITS // vocabulary_size)
    size = -(-num_tokens // max(1, -(-num_tokens // most)))
    return [slice(start, start + size) for start in range(0, num_tokens, size)] if num_tokens else []


def _sum_type(chunks: list[slice], weight_VD: torch.Tensor) -> torch.dtype:
    """Return float32 for several chunks: in bf16 each sum would round what was summed before."""
    return torch.float32 if len(chunks) > 1 else weight_VD.dtype


class _HeadLoss(torch.autograd.Function):
    """Sum of -log p(target) under softmax(hidden @ weight.T); gradients are made in the forward pass."""

    @staticmethod
    def forward(
        context: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        targets_N: torch.Tensor,
        head: OutputLayer,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        nll_sum = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        num_right = torch.zeros((), dtype=torch.int64, device=hidden_ND.device)
        for_hidden, for_weight = context.needs_input_grad[:2]
        gradient_ND = torch.empty_like(hidden_ND) if for_hidden else None
        chunks = _chunks(hidden_ND.shape[0], weight_VD.shape[0])
        sum_type = _sum_type(chunks, weight_VD)
        gradient_VD = torch.zeros_like(weight_VD, dtype=sum_type) if for_weight else None
        for chunk in chunks:
            logits_NV = head.product(hidden_ND[chunk].contiguous())
            nll_N, is_right_N = head.softmax_loss_(
                logits_NV, targets_N[chunk], keeps_gradient=for_hidden or for_weight
            )
            nll_sum += nll_N.sum()
            num_right += is_right_N.sum()
            # From here on the logits are their own gradient.
            if gradient_ND is not None:
                gradient_ND[chunk] = head.input_gradient(logits_NV)
            if gradient_VD is not None:
                gradient_VD += logits_NV.t() @ hidden_ND[chunk]
        # Not by save_for_backward, for they are scaled in place: the weight's is as large as the weight.
        context.gradients = (gradient_ND, None if gradient_VD is None else gradient_VD.to(weight_VD.dtype))
        context.mark_non_differentiable(num_right)
        return nll_sum, num_right

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        made, context.gradients = context.gradients, None
        if made is None:
            raise RuntimeError("The gradients of this loss were already taken.")
        hidden, weight = [None if one is None else one.mul_(gradients[0].to(one.dtype)) for one in made]
        return hidden, weight, None, None


class _TokenLosses(torch.autograd.Function):
    """-log p(target) under softmax(hidden @ weight.T), a number a token."""

    @staticmethod
    def forward(
        context: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        targets_N: torch.Tensor,
        head: OutputLayer,
    ) -> torch.Tensor:
        for_hidden, for_weight = context.needs_input_grad[:2]
        gradient_ND = torch.empty_like(hidden_ND) if for_hidden else None
        nll_N = torch.empty(len(targets_N), dtype=torch.float32, device=hidden_ND.device)
        for chunk in _chunks(len(targets_N), weight_VD.shape[0]):
            logits_NV = head.product(hidden_ND[chunk].contiguous())
            nll_N[chunk], _ = head.softmax_loss_(logits_NV, targets_N[chunk], keeps_gradient=for_hidden)
            if gradient_ND is not None:
                gradient_ND[chunk] = head.input_gradient(logits_NV)
        context.gradient_ND, context.head = gradient_ND, head
        context.save_for_backward(*((hidden_ND, weight_VD, targets_N) if for_weight else ()))
        return nll_N

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scale_N1 = gradients[0][:, None]
        hidden, context.gradient_ND = context.gradient_ND, None
        if hidden is not None:
            hidden = hidden.mul_(scale_N1.to(hidden.dtype))
        weight = None
        if context.saved_tensors:
            hidden_ND, weight_VD, targets_N = context.saved_tensors
            chunks = _chunks(len(targets_N), weight_VD.shape[0])
            weight = torch.zeros_like(weight_VD, dtype=_sum_type(chunks, weight_VD))
            for chunk in chunks:
                logits_NV = context.head.product(hidden_ND[chunk].contiguous())
                context.head.softmax_loss_(logits_NV, targets_N[chunk], keeps_gradient=True)
                weight += logits_NV.mul_(scale_N1[chunk].to(logits_NV.dtype)).t() @ hidden_ND[chunk]
            weight = weight.to(weight_VD.dtype)
        return hidden, weight, None, None
