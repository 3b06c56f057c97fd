"""The parts of the fast path: fused linear layers in their surroundings, and backward passes by hand.

What can be made again in one pass over memory (a norm, a gated activation) is not kept for the backward pass.
Nothing here knows an architecture.

Legend: N tokens with their padding (B rows of T), D inputs, K inputs as wide as a fused layer takes them, O
outputs, R ranks side by side, F feed-forward size, M bottleneck width.
"""

from typing import Any

import torch
from torch import nn

from luthier_cpu.codegen import kernels
from luthier_cpu.training.linear import FusedLinear


class NormLinear(torch.autograd.Function):
    """A fused layer after an RMS norm: x_ND to [N, O]."""

    @staticmethod
    def forward(
        context: Any,
        x_ND: torch.Tensor,
        weight_D: torch.Tensor,
        epsilon: float,
        fused: FusedLinear,
        *parameters: nn.Parameter,  # noqa: ARG004
    ) -> torch.Tensor:
        x_ND = x_ND.contiguous()
        x_NK, inverse_N = kernels.rms_norm(x_ND, weight_D, epsilon, fused.width)
        u_NR = fused.products.low_rank(x_NK)
        context.fused, context.epsilon = fused, epsilon
        context.save_for_backward(x_ND, weight_D, inverse_N, u_NR)
        return fused.products.product(x_NK, u_NR, None)

    @staticmethod
    def backward(context: Any, *gradients_out: torch.Tensor) -> tuple[Any, ...]:
        x_ND, weight_D, inverse_N, u_NR = context.saved_tensors
        fused, gradient_NO = context.fused, gradients_out[0]
        if any(context.needs_input_grad[:2]):
            gradient_NK, gradient_u_NR = fused.products.input_gradients(gradient_NO)
        else:
            # The first layer, its embeddings frozen.
            gradient_u_NR = fused.products.low_rank_gradient(gradient_NO)
        gradients: list[torch.Tensor] = []
        if fused.parameters:
            x_NK, _ = kernels.rms_norm(x_ND, weight_D, context.epsilon, fused.num_inputs)
            gradients = fused.parameter_gradients(gradient_NO, x_NK, u_NR, gradient_u_NR)
        gradient_D = None
        if context.needs_input_grad[1]:
            unit_ND = x_ND.float() * inverse_N[:, None]
            scaled_ND = gradient_NK[:, : fused.num_inputs].float()
            gradient_D = (scaled_ND * unit_ND).sum(dim=0).to(weight_D.dtype)
        gradient_ND = None
        if context.needs_input_grad[0]:
            gradient_ND = kernels.rms_norm_backward(gradient_NK, x_ND, weight_D, inverse_N)
        return (gradient_ND, gradient_D, None, None, *gradients)


class LinearAdd(torch.autograd.Function):
    """A fused layer, whose result is added to the residual stream where one is given: x_NK to [N, O].

    x_NK comes with its last columns unwritten, and only the first D columns of its gradient count. Gated, it
    is instead [N, 2F], and `silu(gate) * up` is the layer's input.
    """

    @staticmethod
    def forward(
        context: Any,
        x_NK: torch.Tensor,
        residual_NO: torch.Tensor | None,
        fused: FusedLinear,
        is_gated: bool,
        *parameters: nn.Parameter,  # noqa: ARG004
    ) -> torch.Tensor:
        hidden_NK = kernels.gated_silu(x_NK, fused.width) if is_gated else x_NK
        u_NR = fused.products.low_rank(hidden_NK)
        context.fused, context.is_gated = fused, is_gated
        context.save_for_backward(x_NK if is_gated or fused.parameters else None, u_NR)
        return fused.products.product(hidden_NK, u_NR, residual_NO)

    @staticmethod
    def backward(context: Any, *gradients_out: torch.Tensor) -> tuple[Any, ...]:
        hidden_NK, u_NR = context.saved_tensors
        fused, gradient_NO = context.fused, gradients_out[0]
        to_input, gradient_u_NR = fused.products.input_gradients(gradient_NO)
        if context.is_gated:
            to_input, hidden_NK = kernels.gated_silu_backward(hidden_NK, to_input)
        gradients: list[torch.Tensor] = []
        if fused.parameters:
            gradients = fused.parameter_gradients(gradient_NO, hidden_NK, u_NR, gradient_u_NR)
        residual = gradient_NO if context.needs_input_grad[1] else None
        return (to_input, residual, None, None, *gradients)


class FusedBottleneck:
    """A bottleneck layer (luthier.methods) in the type of the base's weights.

    Args:
        bottleneck: the module; its parameters stay its own.
    """

    def __init__(self, bottleneck: nn.Module) -> None:
        self.parameters: list[nn.Parameter] = [
            bottleneck.down.weight,
            bottleneck.down.bias,
            bottleneck.up.weight,
            bottleneck.up.bias,
        ]
        self.activation = bottleneck.activation


class BottleneckAdd(torch.autograd.Function):
    """`residual + x + up(act(down(x)))` (Houlsby et al. 2019, arXiv 1902.00751), x and residual [N, D]."""

    @staticmethod
    def forward(
        context: Any,
        x_ND: torch.Tensor,
        residual_ND: torch.Tensor,
        activation: str,
        *parameters: nn.Parameter,
    ) -> torch.Tensor:
        down_MD, down_M, up_DM, up_D = (parameter.to(x_ND.dtype) for parameter in parameters)
        middle_NM = torch.addmm(down_M, x_ND, down_MD.t())
        active_NM = _activate(activation, middle_NM)
        context.activation = activation
        context.types = [parameter.dtype for parameter in parameters]
        context.save_for_backward(x_ND, middle_NM, down_MD, up_DM)
        return torch.addmm(x_ND + up_D, active_NM, up_DM.t()).add_(residual_ND)

    @staticmethod
    def backward(context: Any, *gradients_out: torch.Tensor) -> tuple[Any, ...]:
        x_ND, middle_NM, down_MD, up_DM = context.saved_tensors
        gradient_ND = gradients_out[0].contiguous()
        with torch.enable_grad():
            leaf_NM = middle_NM.detach().requires_grad_()
            active_NM = _activate(context.activation, leaf_NM)
        (gradient_NM,) = torch.autograd.grad(active_NM, leaf_NM, torch.mm(gradient_ND, up_DM))
        gradients = [
            torch.mm(gradient_NM.t(), x_ND),
            gradient_NM.sum(dim=0, dtype=torch.float32),
            torch.mm(gradient_ND.t(), active_NM.detach()),
            gradient_ND.sum(dim=0, dtype=torch.float32),
        ]
        typed = [one.to(dtype) for one, dtype in zip(gradients, context.types, strict=True)]
        return (torch.addmm(gradient_ND, gradient_NM, down_MD), gradient_ND, None, *typed)


def _activate(name: str, x: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x) if name == "tanh" else getattr(nn.functional, name)(x)
