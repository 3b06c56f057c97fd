"""The parts of the fast path: linear layers fused with their low-rank updates, and backward passes by hand.

Layers that share an input are one product. The low-rank update rides in the same product: the input is
widened by `u = x A'`, the weight by `scale * B`, so the forward product gives `x W' + scale u B'` at once,
and the backward one the gradients of x and u at once. Nothing here knows an architecture.

Legend: N tokens with their padding (B rows of T), D inputs, K inputs widened by the ranks, O outputs,
R ranks side by side, H heads of size C.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

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
        layers: PEFT's LoRA layers, or bare linear ones.
        adapter: name of the adapter that is trained.
    """

    def __init__(self, layers: Sequence[nn.Module], adapter: str) -> None:
        bases = [getattr(layer, "base_layer", layer) for layer in layers]
        self.num_inputs = bases[0].in_features
        self.low_ranks: list[_LowRank] = []
        output, rank = 0, 0
        for layer, base in zip(layers, bases, strict=True):
            outputs = slice(output, output + base.out_features)
            output = outputs.stop
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
        width = -(-(self.num_inputs + rank) // _ALIGN) * _ALIGN
        first = bases[0].weight
        self.weight_OK = first.new_zeros(output, width)
        self.a_RD = first.new_zeros(width - self.num_inputs, self.num_inputs)
        start = 0
        for base in bases:
            part = self.weight_OK[start : start + base.out_features, : self.num_inputs]
            part.copy_(base.weight)
            base.weight.data = part
            start += base.out_features
        self.parameters: list[nn.Parameter] = [p for low in self.low_ranks for p in (low.a_RD, low.b_OR)]

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the parameters as the optimizer left them, in the type of the weights."""
        for low in self.low_ranks:
            self.a_RD[low.ranks].copy_(low.a_RD)
            columns = slice(self.num_inputs + low.ranks.start, self.num_inputs + low.ranks.stop)
            self.weight_OK[low.outputs, columns].copy_(low.b_OR * low.scale)

    def widen(self, x_ND: torch.Tensor) -> torch.Tensor:
        """Return x_NK: the input with `x A'` beside it."""
        if self.a_RD.shape[0] == 0:
            return x_ND
        x_NK = x_ND.new_empty(x_ND.shape[0], self.weight_OK.shape[1])
        x_NK[:, : self.num_inputs] = x_ND
        x_NK[:, self.num_inputs :] = torch.mm(x_ND, self.a_RD.t())
        return x_NK

    def backward(
        self, gradient_NO: torch.Tensor, x_NK: torch.Tensor
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the gradient of x_ND, and those of the parameters in their order."""
        gradient_NK = torch.mm(gradient_NO, self.weight_OK)
        if self.a_RD.shape[0] == 0:
            return gradient_NK, []
        gradient_u_NR = gradient_NK[:, self.num_inputs :].contiguous()
        x_ND, u_NR = x_NK[:, : self.num_inputs], x_NK[:, self.num_inputs :].contiguous()
        gradient_ND = torch.addmm(gradient_NK[:, : self.num_inputs], gradient_u_NR, self.a_RD)
        gradient_a_RD = torch.mm(gradient_u_NR.t(), x_ND)
        gradient_b_RO = torch.mm(u_NR.t(), gradient_NO)
        gradients: list[torch.Tensor] = []
        for low in self.low_ranks:
            gradients.append(gradient_a_RD[low.ranks].to(low.a_RD.dtype))
            gradients.append(gradient_b_RO[low.ranks, low.outputs].t().to(low.b_OR.dtype) * low.scale)
        return gradient_ND, gradients


class NormLinear(torch.autograd.Function):
    """A fused layer after an RMS norm (Zhang & Sennrich 2019, arXiv 1910.07467)."""

    @staticmethod
    def forward(
        context: Any,
        x_ND: torch.Tensor,
        weight_D: torch.Tensor,
        epsilon: float,
        fused: FusedLinear,
        *parameters: nn.Parameter,  # noqa: ARG004
    ) -> torch.Tensor:
        wide = x_ND.float()
        inverse_N1 = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
        normed_ND = weight_D * (wide * inverse_N1).to(x_ND.dtype)
        x_NK = fused.widen(normed_ND)
        context.fused = fused
        context.save_for_backward(x_ND, weight_D, inverse_N1, x_NK)
        return torch.mm(x_NK, fused.weight_OK.t())

    @staticmethod
    def backward(context: Any, *gradients_out: torch.Tensor) -> tuple[Any, ...]:
        x_ND, weight_D, inverse_N1, x_NK = context.saved_tensors
        gradient_ND, gradients = context.fused.backward(gradients_out[0], x_NK)
        scaled_ND = gradient_ND.float().mul_(weight_D.float())
        unit_ND = x_ND.float().mul_(inverse_N1)
        shared_N1 = (scaled_ND * unit_ND).mean(-1, keepdim=True)
        gradient_x_ND = scaled_ND.sub_(unit_ND.mul_(shared_N1)).mul_(inverse_N1)
        return (gradient_x_ND.to(x_ND.dtype), None, None, None, *gradients)


class LinearAdd(torch.autograd.Function):
    """A fused layer whose output is added to the residual stream."""

    @staticmethod
    def forward(
        context: Any,
        x_ND: torch.Tensor,
        residual_NO: torch.Tensor,
        fused: FusedLinear,
        *parameters: nn.Parameter,  # noqa: ARG004
    ) -> torch.Tensor:
        x_NK = fused.widen(x_ND)
        context.fused = fused
        context.save_for_backward(x_NK)
        return torch.addmm(residual_NO, x_NK, fused.weight_OK.t())

    @staticmethod
    def backward(context: Any, *gradients_out: torch.Tensor) -> tuple[Any, ...]:
        (x_NK,) = context.saved_tensors
        gradient_ND, gradients = context.fused.backward(gradients_out[0], x_NK)
        return (gradient_ND, gradients_out[0], None, *gradients)


class GatedSilu(torch.autograd.Function):
    """`silu(gate) * up` of a fused gate and up (Shazeer 2020, arXiv 2002.05202)."""

    @staticmethod
    def forward(context: Any, gate_up_NO: torch.Tensor) -> torch.Tensor:
        context.save_for_backward(gate_up_NO)
        gate, up = gate_up_NO.chunk(2, dim=-1)
        return nn.functional.silu(gate).mul_(up)

    @staticmethod
    def backward(context: Any, *gradients_out: torch.Tensor) -> torch.Tensor:
        (gate_up_NO,) = context.saved_tensors
        gate, up = gate_up_NO.chunk(2, dim=-1)
        gradient = gradients_out[0]
        result_NO = torch.empty_like(gate_up_NO)
        gradient_gate, gradient_up = result_NO.chunk(2, dim=-1)
        torch.mul(gradient, nn.functional.silu(gate), out=gradient_up)
        gradient_gate.copy_(torch.ops.aten.silu_backward(gradient * up, gate))
        return result_NO


class BatchedAttention(torch.autograd.Function):
    """Causal attention by three batched products; the query heads of one key head are its rows."""

    @staticmethod
    def forward(
        context: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        scores = torch.bmm(query, key.transpose(1, 2))
        num_pairs, num_keys = scores.shape[0], key.shape[1]
        scores = scores.view(num_pairs, -1, num_keys, num_keys).mul_(scale).add_(bias)
        weights = torch.softmax(scores, dim=-1).view(num_pairs, -1, num_keys)
        context.scale = scale
        context.save_for_backward(query, key, value, weights)
        return torch.bmm(weights, value)

    @staticmethod
    def backward(context: Any, *gradients_out: torch.Tensor) -> tuple[Any, ...]:
        query, key, value, weights = context.saved_tensors
        gradient = gradients_out[0]
        gradient_value = torch.bmm(weights.transpose(1, 2), gradient)
        gradient_weights = torch.bmm(gradient, value.transpose(1, 2))
        gradient_scores = torch.ops.aten._softmax_backward_data(gradient_weights, weights, -1, weights.dtype)
        gradient_scores.mul_(context.scale)
        gradient_query = torch.bmm(gradient_scores, key)
        gradient_key = torch.bmm(gradient_scores.transpose(1, 2), query)
        return gradient_query, gradient_key, gradient_value, None, None


class Rotate(torch.autograd.Function):
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864); its gradient turns the other way."""

    @staticmethod
    def forward(context: Any, x_BTHC: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
        context.save_for_backward(cosine, sine)
        return _rotate(x_BTHC, cosine, sine)

    @staticmethod
    def backward(context: Any, *gradients_out: torch.Tensor) -> tuple[Any, ...]:
        cosine, sine = context.saved_tensors
        return _rotate(gradients_out[0], cosine, -sine), None, None


def _rotate(x_BTHC: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Turn pairs (c, c + C/2) by their angles; `cosine` and `sine` are of shape [1, T, 1, C/2]."""
    half = x_BTHC.shape[-1] // 2
    first, second = x_BTHC[..., :half], x_BTHC[..., half:]
    result = torch.empty(x_BTHC.shape, dtype=x_BTHC.dtype, device=x_BTHC.device)
    torch.sub(first * cosine, second * sine, out=result[..., :half])
    torch.add(second * cosine, first * sine, out=result[..., half:])
    return result
