"""The entry point of `luthier.training`: a Llama-shaped model's loss by fused layers and compiled kernels.

Legend: B rows, T tokens, N supervised tokens, D hidden size, V vocabulary.
"""

import torch

from luthier.methods import Attached, Method
from luthier.modeling.head_loss import OutputLayer, head_loss, head_token_losses
from luthier.modeling.training_protocols import Batch, Loss
from luthier_cpu import refusal
from luthier_cpu.codegen import kernels
from luthier_cpu.gemm.panel_products import PanelProducts, Part, can_multiply
from luthier_cpu.training.llama import FusedLlama, fuse


class CpuAccelerator:
    """Accelerates what `fuse` knows, on a CPU with numba."""

    def accelerate(self, method: Method, attached: Attached, sample: Batch) -> "CpuTrainingModel | None":  # noqa: ARG002
        """Return the fused model, or None for another device, type or architecture, or without numba."""
        if refusal(attached.causal_lm.device.type) is not None:
            return None
        head = attached.causal_lm.get_output_embeddings()
        if type(head) is not torch.nn.Linear or head.bias is not None or not kernels.is_compiled(head.weight):
            return None
        fused = fuse(method, attached)
        return None if fused is None else CpuTrainingModel(fused, head.weight)

    def preload(self) -> None:
        """Compile or load all kernels of training."""
        if refusal("cpu") is not None:
            return
        from luthier_cpu.__main__ import load_all

        # Kernels are tried here, and a fork would lose the other threads of a team.
        torch.set_num_threads(1)
        load_all()


class CpuOutputLayer(OutputLayer):
    """The output layer by panels, where the processor has them, and a softmax of one pass."""

    def __init__(self, weight_VD: torch.Tensor) -> None:
        super().__init__(weight_VD)
        data, parts = weight_VD.detach(), [Part(len(weight_VD))]
        self._panels = PanelProducts(data, parts) if can_multiply(data, parts) else None

    def product(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """Return logits_NV."""
        return super().product(hidden_ND) if self._panels is None else self._panels.product(hidden_ND)

    def input_gradient(self, gradient_NV: torch.Tensor) -> torch.Tensor:
        """Return the gradient of the hidden states."""
        if self._panels is None:
            return super().input_gradient(gradient_NV)
        return self._panels.input_gradient(gradient_NV)

    def softmax_loss_(
        self, logits_NV: torch.Tensor, targets_N: torch.Tensor, *, keeps_gradient: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Score logits against targets, and turn them in place into their own gradient."""
        return kernels.softmax_loss_(logits_NV, targets_N, keeps_gradient=keeps_gradient)


class CpuTrainingModel:
    """A fused model with its output layer (`luthier.modeling.protocols.TrainingModel`)."""

    def __init__(self, fused: FusedLlama, head_weight_VD: torch.Tensor) -> None:
        self.fused = fused
        self._head = CpuOutputLayer(head_weight_VD)

    def loss(self, batch: Batch) -> Loss:
        """Score the supervised tokens."""
        hidden_ND, targets_N = self._supervised_hidden_states(batch)
        return head_loss(hidden_ND, self._head, targets_N)

    def token_losses(self, batch: Batch) -> torch.Tensor:
        """Return the negative log-likelihood of each supervised token, float32 [N]."""
        hidden_ND, targets_N = self._supervised_hidden_states(batch)
        return head_token_losses(hidden_ND, self._head, targets_N)

    @torch.no_grad()
    def logits(self, batch: Batch) -> torch.Tensor:
        """Return logits_NV of the positions that predict a supervised token."""
        hidden_ND, _ = self._supervised_hidden_states(batch)
        return self._head.product(hidden_ND.contiguous())

    def _supervised_hidden_states(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Run a batch for its supervised tokens alone; tokens that all rows begin with run once."""
        num_shared, num_needed = batch.num_shared, batch.num_needed
        following = slice(num_shared + 1, num_needed + 1)
        wanted_BT = batch.supervised_BT[:, following]
        hidden_ND = self.fused.wanted_hidden_states(
            batch.token_ids_BT[:, :num_needed], wanted_BT, num_shared=num_shared
        )
        return hidden_ND, batch.token_ids_BT[:, following][wanted_BT]
