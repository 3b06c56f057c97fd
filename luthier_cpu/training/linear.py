"""Linear layers that share an input as one product with their low-rank updates, and its gradients.

The plain layers' weights become views of the fused one, so that no weight lies in memory twice. There are two
ways to multiply: by panels (panel_products.py), and by torch's products anywhere, where the low-rank
update rides in the same product: the input is widened by `u = x A'`, the weight by `scale * B`, so that the
forward product gives `x W' + scale u B'` at once, and the backward one the gradients of x and u at once.

Legend: N tokens, D inputs, K inputs as wide as the product takes them (D, and the ranks where they ride
along), O outputs, R ranks side by side.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from luthier_cpu.gemm.panel_products import PanelProducts, Part, can_multiply

# Products run well on rows of whole cache lines.
_ALIGN = 32


class WideUpdate(NamedTuple):
    """`scale * b a` beside a layer, as it is trained and where a training step's wide product reads it."""

    a_RK: torch.Tensor
    b_OR: torch.Tensor
    scale: float
    a_place_RK: torch.Tensor
    b_place_OR: torch.Tensor


def widen_low_ranks(updates: Sequence[WideUpdate]) -> None:
    """Write updates where the wide product reads them, `b` times its scale, in the type that is there."""
    for update in updates:
        update.a_place_RK.copy_(update.a_RK)
        update.b_place_OR.copy_(update.b_OR * update.scale)


class FusedLinear(ABC):
    """Linear layers that share an input.

    Args:
        layers: PEFT's LoRA layers, or bare linear ones, whose weights may be trained.
    """

    def __init__(self, layers: Sequence[nn.Module], adapter: str) -> None:
        bases = [getattr(layer, "base_layer", layer) for layer in layers]
        self.num_inputs = bases[0].in_features
        self._parts = _parts(layers, adapter)
        self.width = self._find_width(sum(part.rank for part in self._parts))
        self.weight_OK = (
            bases[0].weight.detach().new_zeros(sum(part.num_outputs for part in self._parts), self.width)
        )
        self.parameters = [
            parameter for part in self._parts for parameter in (part.a_RD, part.b_OR) if parameter is not None
        ]
        self._trained_outputs: list[slice] = []
        start = 0
        for base in bases:
            outputs = slice(start, start + base.out_features)
            start = outputs.stop
            if base.weight.requires_grad:
                self.parameters.append(base.weight)
                self._trained_outputs.append(outputs)
            own_OD = self.weight_OK[outputs, : self.num_inputs]
            own_OD.copy_(base.weight.detach())
            base.weight.data = own_OD

    @abstractmethod
    def _find_width(self, rank: int) -> int:
        """Return K for so many ranks together."""

    def updates(self) -> list[WideUpdate]:
        """Return what must be widened (`widen_low_ranks`) after every update and before the next product."""
        return []

    @abstractmethod
    def low_rank(self, x_NK: torch.Tensor) -> torch.Tensor | None:
        """Return u_NR, the product with all updates' first halves, None without updates.

        Columns of the input beyond D are written.
        """

    @abstractmethod
    def product(
        self, x_NK: torch.Tensor, u_NR: torch.Tensor | None, residual_NO: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the layers' result after `low_rank`, plus a residual where one is given."""

    @abstractmethod
    def input_gradient(self, gradient_NO: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the gradients of the input, in the first D of K columns, and of u."""

    @abstractmethod
    def low_rank_gradient(self, gradient_NO: torch.Tensor) -> torch.Tensor | None:
        """Return the gradient of u alone, where nobody asks for the input's."""

    @abstractmethod
    def _update_gradients(
        self, gradient_NO: torch.Tensor, x_ND: torch.Tensor, u_NR: torch.Tensor, gradient_u_NR: torch.Tensor
    ) -> list[torch.Tensor]:
        """Return the gradients of the updates' parameters."""

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
            gradients += self._update_gradients(gradient_NO, x_ND, u_NR, gradient_u_NR)
        if self._trained_outputs:
            gradient_OD = torch.mm(gradient_NO.t(), x_ND)
            gradients += [gradient_OD[outputs] for outputs in self._trained_outputs]
        return gradients


@dataclass(frozen=True)
class _Riding:
    """One layer's update that rides in a product: its parameters, scale, and where they go."""

    a_RD: torch.Tensor
    b_OR: torch.Tensor
    scale: float
    outputs: slice
    ranks: slice


class WideLinear(FusedLinear):
    """By torch's products, the updates riding along."""

    def __init__(self, layers: Sequence[nn.Module], adapter: str) -> None:
        super().__init__(layers, adapter)
        self.a_RD = self.weight_OK.new_zeros(self.width - self.num_inputs, self.num_inputs)
        self._riding: list[_Riding] = []
        output, rank = 0, 0
        for part in self._parts:
            outputs, ranks = slice(output, output + part.num_outputs), slice(rank, rank + part.rank)
            if part.a_RD is not None and part.b_OR is not None:
                self._riding.append(_Riding(part.a_RD, part.b_OR, part.scale, outputs, ranks))
            output, rank = outputs.stop, ranks.stop

    def _find_width(self, rank: int) -> int:
        return self.num_inputs if rank == 0 else -(-(self.num_inputs + rank) // _ALIGN) * _ALIGN

    def updates(self) -> list[WideUpdate]:
        """Return the low-rank parameters with where they go, in the type of the weights."""
        columns = self.weight_OK[:, self.num_inputs :]
        return [
            WideUpdate(low.a_RD, low.b_OR, low.scale, self.a_RD[low.ranks], columns[low.outputs, low.ranks])
            for low in self._riding
        ]

    def low_rank(self, x_NK: torch.Tensor) -> torch.Tensor | None:
        """Return u_NR, and fill the last columns of the input by it."""
        if not self._riding:
            return None
        u_NR = torch.mm(x_NK[:, : self.num_inputs], self.a_RD.t())
        x_NK[:, self.num_inputs :] = u_NR
        return u_NR

    def product(
        self,
        x_NK: torch.Tensor,
        u_NR: torch.Tensor | None,  # noqa: ARG002 - it rides in x
        residual_NO: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return the layers' result."""
        if residual_NO is None:
            return torch.mm(x_NK, self.weight_OK.t())
        return torch.addmm(residual_NO, x_NK, self.weight_OK.t())

    def input_gradient(self, gradient_NO: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the gradients of the input, K wide, and of u."""
        gradient_NK = torch.mm(gradient_NO, self.weight_OK)
        if not self._riding:
            return gradient_NK, None
        gradient_u_NR = gradient_NK[:, self.num_inputs :].contiguous()
        gradient_NK[:, : self.num_inputs].addmm_(gradient_u_NR, self.a_RD)
        return gradient_NK, gradient_u_NR

    def low_rank_gradient(self, gradient_NO: torch.Tensor) -> torch.Tensor | None:
        """Return the gradient of u alone."""
        return torch.mm(gradient_NO, self.weight_OK[:, self.num_inputs :]) if self._riding else None

    def _update_gradients(
        self, gradient_NO: torch.Tensor, x_ND: torch.Tensor, u_NR: torch.Tensor, gradient_u_NR: torch.Tensor
    ) -> list[torch.Tensor]:
        gradient_a_RD = torch.mm(gradient_u_NR.t(), x_ND)
        gradient_b_OR = torch.mm(gradient_NO.t(), u_NR)
        gradients = []
        for low in self._riding:
            gradients.append(gradient_a_RD[low.ranks].to(low.a_RD.dtype))
            gradient_OR = gradient_b_OR[low.outputs, low.ranks].to(low.b_OR.dtype)
            gradients.append(gradient_OR.mul_(low.scale))
        return gradients


class PanelLinear(FusedLinear):
    """By panels, which read the updates where they are trained."""

    def __init__(self, layers: Sequence[nn.Module], adapter: str) -> None:
        super().__init__(layers, adapter)
        self._products = PanelProducts(self.weight_OK, self._parts)

    def _find_width(self, rank: int) -> int:  # noqa: ARG002
        return self.num_inputs

    def low_rank(self, x_NK: torch.Tensor) -> torch.Tensor | None:
        """Return u_NR."""
        return self._products.low_rank(x_NK)

    def product(
        self, x_NK: torch.Tensor, u_NR: torch.Tensor | None, residual_NO: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the layers' result."""
        return self._products.product(x_NK, u_NR, residual_NO)

    def input_gradient(self, gradient_NO: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the gradients of the input and of u."""
        gradient_u_NR = self._products.low_rank_gradient(gradient_NO)
        return self._products.input_gradient(gradient_NO, gradient_u_NR), gradient_u_NR

    def low_rank_gradient(self, gradient_NO: torch.Tensor) -> torch.Tensor | None:
        """Return the gradient of u alone."""
        return self._products.low_rank_gradient(gradient_NO)

    def _update_gradients(
        self, gradient_NO: torch.Tensor, x_ND: torch.Tensor, u_NR: torch.Tensor, gradient_u_NR: torch.Tensor
    ) -> list[torch.Tensor]:
        return self._products.update_gradients(gradient_NO, x_ND, u_NR, gradient_u_NR)


def fuse_linear(layers: Sequence[nn.Module], adapter: str) -> FusedLinear:
    """Return layers that share an input as one product, by panels where these are made.

    Args:
        layers: PEFT's LoRA layers, or bare linear ones, whose weights may be trained.

    Returns:
        The fused layer; the plain layers' weights are views of its.
    """
    are_fit = all(
        can_multiply(getattr(layer, "base_layer", layer).weight.detach(), [part])
        for layer, part in zip(layers, _parts(layers, adapter), strict=True)
    )
    return (PanelLinear if are_fit else WideLinear)(layers, adapter)


def _parts(layers: Sequence[nn.Module], adapter: str) -> list[Part]:
    parts = []
    for layer in layers:
        num_outputs = getattr(layer, "base_layer", layer).out_features
        if hasattr(layer, "lora_A"):
            a_RD, b_OR = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
            parts.append(Part(num_outputs, a_RD, b_OR, float(layer.scaling[adapter])))
        else:
            parts.append(Part(num_outputs))
    return parts
