"""A base with its method attached, seen as what training needs: rows in, loss out.

Legend: B rows, T tokens, D hidden size, V vocabulary.
"""

import torch

from luthier.methods import Attached, Method
from luthier.training.batches import Batch
from luthier.training.loss import Loss, frozen_head_loss, full_logits_loss, gather_supervised

# Logits by way of the bare output layer must match the model's own this well to be used.
_HEAD_TOLERANCE = 1e-3


class Trainee:
    """The model in training.

    Args:
        method: how it is tuned.
        attached: the base with the method's parameters.
        device: where it lies.
        sample: a short batch on which the output layer is tried out.
    """

    def __init__(self, method: Method, attached: Attached, device: str, sample: Batch) -> None:
        self.method = method
        self.attached = attached
        self.device = device
        self.parameters = [parameter for _, parameter in attached.named_trained_parameters()]
        self._head_weight_VD = self._find_plain_head(sample)

    def loss(self, batch: Batch) -> Loss:
        """Score a batch's supervised tokens.

        Args:
            batch: rows on the CPU.

        Returns:
            Sums over the supervised tokens; differentiable unless gradients are switched off.
        """
        batch = batch.to(self.device)
        if self._head_weight_VD is None:
            return full_logits_loss(*gather_supervised(self.logits(batch), batch))
        hidden_BTD = self.method.hidden_states(self.attached, batch.token_ids_BT)
        hidden_ND, targets_N = gather_supervised(hidden_BTD, batch)
        return frozen_head_loss(hidden_ND, self._head_weight_VD, targets_N)

    def logits(self, batch: Batch) -> torch.Tensor:
        """Return logits_BTV as the whole model gives them."""
        return self.attached.model(input_ids=batch.token_ids_BT.to(self.device), use_cache=False).logits

    @torch.no_grad()
    def _find_plain_head(self, sample: Batch) -> torch.Tensor | None:
        """Return the output layer's weight when logits are its product with the hidden states alone.

        Some models scale, cap or shift their logits. Trying it on a row tells, for any architecture.
        """
        head = self.attached.causal_lm.get_output_embeddings()
        if type(head) is not torch.nn.Linear or head.bias is not None or head.weight.requires_grad:
            return None
        sample = sample.to(self.device)
        hidden_BTD = self.method.hidden_states(self.attached, sample.token_ids_BT)
        expected_BTV = self.logits(sample).float()
        found_BTV = head(hidden_BTD).float()
        gap = (found_BTV - expected_BTV).abs().max()
        return head.weight if gap <= _HEAD_TOLERANCE * expected_BTV.abs().max() else None
