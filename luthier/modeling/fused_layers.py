"""The parts of the fast path: linear layers fused with their low-rank updates, and backward passes by hand.

Layers that share an input are one product. The low-rank update rides in the same product: the input is
widened by `u = x A'`, the weight by `scale * B`, so the forward product gives `x W' + scale u B'` at once,
and the backward one the gradients of x and u at once. What can be made again in one pass over memory (a
norm, a gated activation) is not kept for the backward pass. Nothing here knows an architecture.

Legend: N tokens with their padding (B rows of T), D inputs, K inputs widened by the ranks, O outputs,
R ranks side by side, F feed-forward size, E columns of q, k and v, P pairs of a row and a key head,
Q queries of a pair, S keys, C head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from luthier.modeling import kernels
from luthier.modeling.kernels.laying import WideUpdate

# Products run well on rows of whole cache lines.
_ALIGN = 32


@dataclass(frozen=True)
class _LowRank:
    """One layer's update inside a fused layer: its parameters, scale, and where they go."""

    a_RD: nn.Parameter
    b_OR: nn.Parameter
    scale: float
    outputs: slice
    ranks: slice


class FusedLinear:
    """Linear layers that share an input, as one product with their low-rank updates in it.

    The plain layers' weights become views of this one's, so that no weight lies in memory twice.

    Args:
        layers: PEFT's LoRA layers, or bare linear ones, whose weights may be trained.
        adapter: name of the adapter that is trained.
    """

    def __init__(self, layers: Sequence[nn.Module], adapter: str) -> None:
        bases = [getattr(layer, "base_layer", layer) for layer in layers]
        self.num_inputs = bases[0].in_features
        self.low_ranks: list[_LowRank] = []
        self._trained: list[tuple[nn.Parameter, slice]] = []
        output, rank = 0, 0
        for layer, base in zip(layers, bases, strict=True):
            outputs = slice(output, output + base.out_features)
            output = outputs.stop
            if base.weight.requires_grad:
                self._trained.append((base.weight, outputs))
            if not hasattr(layer, "lora_A"):
                continue
            ranks = slice(rank, rank + layer.r[adapter])
            rank = ranks.stop
            self.low_ranks.append(
                _LowRank(
                    layer.lora_A[adapter].weight,
                    layer.lora_B[adapter].weight,
                    float(layer.scaling[adapter]),
                    outputs,
                    ranks,
                )
            )
        self.width = self.num_inputs if rank == 0 else -(-(self.num_inputs + rank) // _ALIGN) * _ALIGN
        first = bases[0].weight
        self.weight_OK = first.detach().new_zeros(output, self.width)
        self.a_RD = first.detach().new_zeros(self.width - self.num_inputs, self.num_inputs)
        start = 0
        for base in bases:
            part = self.weight_OK[start : start + base.out_features, : self.num_inputs]
            part.copy_(base.weight.detach())
            base.weight.data = part
            start += base.out_features
        self.parameters: list[nn.Parameter] = [p for low in self.low_ranks for p in (low.a_RD, low.b_OR)]
        self.parameters += [weight for weight, _ in self._trained]

    def updates(self) -> list[WideUpdate]:
        """Return the low-rank parameters with where they go, in the type of the weights, before a product."""
        columns = self.weight_OK[:, self.num_inputs :]
        return [
            WideUpdate(low.a_RD, low.b_OR, low.scale, self.a_RD[low.ranks], columns[low.outputs, low.ranks])
            for low in self.low_ranks
        ]

    def complete(self, x_NK: torch.Tensor) -> torch.Tensor | None:
        """Fill the last columns of a wide input by `u = x A'`; return u_NR, None without updates."""
        if not self.low_ranks:
            return None
        u_NR = torch.mm(x_NK[:, : self.num_inputs], self.a_RD.t())
        x_NK[:, self.num_inputs :] = u_NR
        return u_NR

    def input_gradient(self, gradient_NO: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the gradients of the input, in the first D of K columns, and of u."""
        gradient_NK = torch.mm(gradient_NO, self.weight_OK)
        if not self.low_ranks:
            return gradient_NK, None
        gradient_u_NR = gradient_NK[:, self.num_inputs :].contiguous()
        gradient_NK[:, : self.num_inputs].addmm_(gradient_u_NR, self.a_RD)
        return gradient_NK, gradient_u_NR

    def low_rank_gradient(self, gradient_NO: torch.Tensor) -> torch.Tensor | None:
        """Return the gradient of u alone, where nobody asks for the input's."""
        return torch.mm(gradient_NO, self.weight_OK[:, self.num_inputs :]) if self.low_ranks else None

    def parameter_gradients(
        self,
        gradient_NO: torch.Tensor,
        x_NK: torch.Tensor,
        u_NR: torch.Tensor | None,
        gradient_u_NR: torch.Tensor | None,
    ) -> list[torch.Tensor]:
        """Return the gradients of the parameters, in their order, each in its parameter's type."""
        gradients: list[torch.Tensor] = []
        x_ND = x_NK[:, : self.num_inputs]
        if u_NR is not None and gradient_u_NR is not None:
            gradient_a_RD = torch.mm(gradient_u_NR.t(), x_ND)
            # Laid as the parameters are, so that autograd takes the gradients as they come.
            gradient_b_OR = torch.mm(gradient_NO.t(), u_NR)
            for low in self.low_ranks:
                gradients.append(gradient_a_RD[low.ranks].to(low.a_RD.dtype))
                gradient_OR = gradient_b_OR[low.outputs, low.ranks].to(low.b_OR.dtype)
                gradients.append(gradient_OR.mul_(low.scale))
        if self._trained:
            gradient_OD = torch.mm(gradient_NO.t(), x_ND)
            gradients += [gradient_OD[outputs] for _, outputs in self._trained]
        return gradients


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
        u_NR = fused.complete(x_NK)
        context.fused, context.epsilon = fused, epsilon
        context.save_for_backward(x_ND, weight_D, inverse_N, u_NR)
        return torch.mm(x_NK, fused.weight_OK.t())

    @staticmethod
    def backward(context: Any, *gradients_out: torch.Tensor) -> tuple[Any, ...]:
        x_ND, weight_D, inverse_N, u_NR = context.saved_tensors
        fused, gradient_NO = context.fused, gradients_out[0]
        if any(context.needs_input_grad[:2]):
            gradient_NK, gradient_u_NR = fused.input_gradient(gradient_NO)
        else:
            # The first layer, its embeddings frozen.
            gradient_u_NR = fused.low_rank_gradient(gradient_NO)
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

    x_NK comes with its last columns unwritten, and its gradient is meant in the first D columns.
    """

    @staticmethod
    def forward(
        context: Any,
        x_NK: torch.Tensor,
        residual_NO: torch.Tensor | None,
        fused: FusedLinear,
        *parameters: nn.Parameter,  # noqa: ARG004
    ) -> torch.Tensor:
        u_NR = fused.complete(x_NK)
        context.fused = fused
        context.save_for_backward(x_NK if fused.parameters else None, u_NR)
        return _product(x_NK, residual_NO, fused)

    @staticmethod
    def backward(context: Any, *gradients_out: torch.Tensor) -> tuple[Any, ...]:
        x_NK, u_NR = context.saved_tensors
        fused, gradient_NO = context.fused, gradients_out[0]
        gradient_NK, gradient_u_NR = fused.input_gradient(gradient_NO)
        gradients: list[torch.Tensor] = []
        if x_NK is not None:
            gradients = fused.parameter_gradients(gradient_NO, x_NK, u_NR, gradient_u_NR)
        residual = gradient_NO if context.needs_input_grad[1] else None
        return (gradient_NK, residual, None, *gradients)


class GatedLinearAdd(torch.autograd.Function):
    """`silu(gate) * up`, then a fused layer, then the residual stream where one is given."""

    @staticmethod
    def forward(
        context: Any,
        gate_up_NF: torch.Tensor,
        residual_NO: torch.Tensor | None,
        fused: FusedLinear,
        *parameters: nn.Parameter,  # noqa: ARG004
    ) -> torch.Tensor:
        hidden_NK = kernels.gated_silu(gate_up_NF, fused.width)
        u_NR = fused.complete(hidden_NK)
        context.fused = fused
        context.save_for_backward(gate_up_NF, u_NR)
        return _product(hidden_NK, residual_NO, fused)

    @staticmethod
    def backward(context: Any, *gradients_out: torch.Tensor) -> tuple[Any, ...]:
        gate_up_NF, u_NR = context.saved_tensors
        fused, gradient_NO = context.fused, gradients_out[0]
        gradient_NK, gradient_u_NR = fused.input_gradient(gradient_NO)
        gradient_NF, hidden_NF = kernels.gated_silu_backward(gate_up_NF, gradient_NK)
        gradients: list[torch.Tensor] = []
        if fused.parameters:
            gradients = fused.parameter_gradients(gradient_NO, hidden_NF, u_NR, gradient_u_NR)
        residual = gradient_NO if context.needs_input_grad[1] else None
        return (gradient_NF, residual, None, *gradients)


def _product(x_NK: torch.Tensor, residual_NO: torch.Tensor | None, fused: FusedLinear) -> torch.Tensor:
    if residual_NO is None:
        return torch.mm(x_NK, fused.weight_OK.t())
    return torch.addmm(residual_NO, x_NK, fused.weight_OK.t())


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
