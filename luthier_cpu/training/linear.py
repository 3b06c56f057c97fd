"""Linear layers that share an input as one product with their low-rank updates, and its gradients.

The layers' own weights become views of the fused one, so that no weight is in memory twice. There are two
ways to multiply: by panels (panel_products.py), and by torch's products anywhere, where the low-rank update
rides in the same product: the input is widened by `u = x A'`, the weight by `scale * B`, so that the forward
product gives `x W' + scale u B'` at once, and the backward one the gradients of x and u at once.

Legend: N tokens, D inputs, K inputs as wide as the product takes them (D, and the ranks where they ride
along), O outputs, R ranks side by side.
"""

from collections.abc import Sequence

import torch
from torch import nn

from luthier_cpu.gemm.panel_products import PanelProducts, Part, can_multiply

# Products run well on rows of whole cache lines.
_ALIGN = 32


class WideProducts:
    """Torch's products with one weight, its updates riding along; as `PanelProducts`.

    Args:
        weight_OK: its columns beyond D, and zeros, take the updates.
    """

    def __init__(self, weight_OK: torch.Tensor, parts: Sequence[Part], num_inputs: int) -> None:
        self._weight_OK, self._num_inputs = weight_OK, num_inputs
        self._a_RD = weight_OK.new_zeros(weight_OK.shape[1] - num_inputs, num_inputs)
        self._b_OR = weight_OK[:, num_inputs:]
        # Each part with an update: its `a` and `b`, its scale, and which outputs and ranks are its own.
        self._updates: list[tuple[torch.Tensor, torch.Tensor, float, slice, slice]] = []
        output, rank = 0, 0
        for part in parts:
            outputs, ranks = slice(output, output + part.num_outputs), slice(rank, rank + part.rank)
            if part.a_RD is not None and part.b_OR is not None:
                self._updates.append((part.a_RD, part.b_OR, part.scale, outputs, ranks))
            output, rank = outputs.stop, ranks.stop

    def widen(self) -> None:
        """Write the updates where the product reads them, `b` times its scale, in the weight's type."""
        for a_RD, b_OR, scale, outputs, ranks in self._updates:
            self._a_RD[ranks].copy_(a_RD)
            self._b_OR[outputs, ranks].copy_(b_OR * scale)

    def low_rank(self, x_NK: torch.Tensor) -> torch.Tensor | None:
        """Return u_NR, the products with all updates' `a`, and write it into x's last columns."""
        if not self._updates:
            return None
        u_NR = torch.mm(x_NK[:, : self._num_inputs], self._a_RD.t())
        x_NK[:, self._num_inputs :] = u_NR
        return u_NR

    def low_rank_gradient(self, gradient_NO: torch.Tensor) -> torch.Tensor | None:
        """Return the gradient of u alone; None without updates."""
        return torch.mm(gradient_NO, self._b_OR) if self._updates else None

    def product(
        self,
        x_NK: torch.Tensor,
        u_NR: torch.Tensor | None,  # noqa: ARG002 - it rides in x
        residual_NO: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return `x W'` with the updates, after `low_rank`, plus a residual."""
        if residual_NO is None:
            return torch.mm(x_NK, self._weight_OK.t())
        return torch.addmm(residual_NO, x_NK, self._weight_OK.t())

    def input_gradients(self, gradient_NO: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the gradients of x, in the first D of K columns, and of u."""
        gradient_NK = torch.mm(gradient_NO, self._weight_OK)
        if not self._updates:
            return gradient_NK, None
        gradient_u_NR = gradient_NK[:, self._num_inputs :].contiguous()
        gradient_NK[:, : self._num_inputs].addmm_(gradient_u_NR, self._a_RD)
        return gradient_NK, gradient_u_NR

    def update_gradients(
        self, gradient_NO: torch.Tensor, x_ND: torch.Tensor, u_NR: torch.Tensor, gradient_u_NR: torch.Tensor
    ) -> list[torch.Tensor]:
        """Return the gradients of `a` and `b` of every part that has them, in their types."""
        gradient_a_RD = torch.mm(gradient_u_NR.t(), x_ND)
        gradient_b_OR = torch.mm(gradient_NO.t(), u_NR)
        gradients = []
        for a_RD, b_OR, scale, outputs, ranks in self._updates:
            gradients.append(gradient_a_RD[ranks].to(a_RD.dtype))
            gradients.append(gradient_b_OR[outputs, ranks].to(b_OR.dtype).mul_(scale))
        return gradients


class FusedLinear:
    """Linear layers that share an input, by panels where these are made.

    Args:
        layers: PEFT's LoRA layers, or bare linear ones, whose weights may be trained. Their weights become
            views of the fused one.
    """

    def __init__(self, layers: Sequence[nn.Module], adapter: str) -> None:
        bases = [getattr(layer, "base_layer", layer) for layer in layers]
        parts = [_part(layer, adapter) for layer in layers]
        are_fit = all(
            can_multiply(base.weight.detach(), [part]) for base, part in zip(bases, parts, strict=True)
        )
        self.num_inputs = bases[0].in_features
        rank = 0 if are_fit else sum(part.rank for part in parts)
        self.width = -(-(self.num_inputs + rank) // _ALIGN) * _ALIGN if rank else self.num_inputs
        num_outputs = sum(part.num_outputs for part in parts)
        weight_OK = bases[0].weight.detach().new_zeros(num_outputs, self.width)
        self.parameters = [one for part in parts for one in (part.a_RD, part.b_OR) if one is not None]
        self._trained_outputs: list[slice] = []
        start = 0
        for base in bases:
            outputs = slice(start, start + base.out_features)
            start = outputs.stop
            if base.weight.requires_grad:
                self.parameters.append(base.weight)
                self._trained_outputs.append(outputs)
            own_OD = weight_OK[outputs, : self.num_inputs]
            own_OD.copy_(base.weight.detach())
            base.weight.data = own_OD
        self.products: PanelProducts | WideProducts = (
            PanelProducts(weight_OK, parts) if are_fit else WideProducts(weight_OK, parts, self.num_inputs)
        )

    def read_updates(self) -> None:
        """Take the updates as they are now, before the next product."""
        # Panels read them where they are trained.
        if isinstance(self.products, WideProducts):
            self.products.widen()

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
            gradients += self.products.update_gradients(gradient_NO, x_ND, u_NR, gradient_u_NR)
        if self._trained_outputs:
            gradient_OD = torch.mm(gradient_NO.t(), x_ND)
            gradients += [gradient_OD[outputs] for outputs in self._trained_outputs]
        return gradients


def _part(layer: nn.Module, adapter: str) -> Part:
    num_outputs = getattr(layer, "base_layer", layer).out_features
    if not hasattr(layer, "lora_A"):
        return Part(num_outputs)
    a_RD, b_OR = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    return Part(num_outputs, a_RD, b_OR, float(layer.scaling[adapter]))
