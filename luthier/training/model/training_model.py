"""A base with its method attached, seen as what training needs: rows in, loss out.

Legend: B rows, T tokens, D hidden size, V vocabulary.
"""

from collections.abc import Sequence

import torch

from luthier.core.errors import SelfCheckError
from luthier.methods import Attached, Method
from luthier.modeling.fused_llama import FusedLlama, fuse
from luthier.training.model.agreement import ComputesInFloat32, agrees, is_as_exact, is_low_precision
from luthier.training.model.batches import Batch
from luthier.training.model.loss import Loss, full_logits_loss, gather_supervised, head_loss

# What configurations call a cap or a factor on logits: Gemma 2 and 3, Cohere, Granite.
_LOGIT_TRANSFORMS = ("final_logit_softcapping", "logit_scale", "logits_scaling")


class Trainee:
    """The model in training.

    Args:
        device: where it lies.
        sample: a short batch on which shortcuts are tried out.
    """

    def __init__(self, method: Method, attached: Attached, device: str, sample: Batch) -> None:
        self.method = method
        self.attached = attached
        self.device = device
        self.sample = sample.to(device)
        self.named_parameters = attached.named_trained_parameters()
        self.parameters = [parameter for _, parameter in self.named_parameters]
        was_training = attached.model.training
        attached.model.eval()
        self._fused = self._find_fused(self.sample)
        # The output layer's weight, where logits are a product with it and no more.
        self.head_weight_VD = self._find_plain_head(self.sample)
        # A whole model's training overwrites the base, so what it was must be known before.
        self.start_logits_BTV = self._start_logits() if method.is_whole_model else None
        # What a model that goes on from another said of the sample before its first step.
        self.parent_logits_BTV: torch.Tensor | None = None
        attached.model.train(was_training)

    @property
    def path(self) -> str:
        """Which code runs the layers: `fused` or `plain`."""
        return "plain" if self._fused is None else "fused"

    def loss(self, batch: Batch) -> Loss:
        """Score a batch's supervised tokens.

        Returns:
            Sums over the supervised tokens; differentiable unless gradients are switched off.
        """
        if self.head_weight_VD is None:
            return full_logits_loss(*gather_supervised(self.logits(batch), batch.to(self.device)))
        hidden_ND, targets_N = self.supervised_hidden_states(batch)
        return head_loss(hidden_ND, self.head_weight_VD, targets_N)

    def supervised_hidden_states(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Run a batch for its supervised tokens alone.

        What no score depends on does not run; tokens that all rows begin with run once on the fast path.

        Returns:
            hidden_ND before the output layer, and targets_N, the tokens to be predicted.
        """
        num_needed, num_shared = batch.num_needed, batch.num_shared
        batch = batch.to(self.device)
        token_ids_BT = batch.token_ids_BT[:, :num_needed]
        if self._fused is None:
            return gather_supervised(self.hidden_states(token_ids_BT), batch)
        following = slice(num_shared + 1, num_needed + 1)
        wanted_BT = batch.supervised_BT[:, following]
        targets_N = batch.token_ids_BT[:, following][wanted_BT]
        return self._fused.wanted_hidden_states(token_ids_BT, wanted_BT, num_shared=num_shared), targets_N

    def hidden_states(self, token_ids_BT: torch.Tensor) -> torch.Tensor:
        """Return hidden_BTD before the output layer, on the path that training takes."""
        if self._fused is not None:
            return self._fused.hidden_states(token_ids_BT)
        return self.method.hidden_states(self.attached, token_ids_BT)

    def logits(self, batch: Batch) -> torch.Tensor:
        """Return logits_BTV as the whole model gives them."""
        return self.method.logits(self.attached, batch.token_ids_BT.to(self.device))

    def clear_gradients(self) -> None:
        """Forget all gradients."""
        for parameter in self.parameters:
            parameter.grad = None
            parameter.grad_dtype = parameter.dtype

    def add_gradients(self, loss: torch.Tensor) -> None:
        """Add the gradients of one part of a step to those of the parts before it.

        A step of one part leaves gradients in the type of the parameters. The second part turns the sums
        into float32, in which a bf16 gradient is then added as soon as it is there.
        """
        for parameter in self.parameters:
            if parameter.grad is not None and parameter.grad.dtype != torch.float32:
                _widen_gradient(parameter)
        loss.backward()

    @property
    def gradients(self) -> list[torch.Tensor]:
        """The step's gradients so far; none for parameters that got none."""
        return [parameter.grad for parameter in self.parameters if parameter.grad is not None]

    @torch.no_grad()
    def prove_shortcuts(self, samples: Sequence[Batch]) -> None:
        """Compare every shortcut in use with the whole model, with the parameters as they are now.

        At the start an update may be zero, and then a shortcut that gets it wrong agrees too.

        Raises:
            SelfCheckError: when a shortcut gives other results than the model, or the model none.
        """
        model = self.attached.model
        was_training = model.training
        model.eval()
        try:
            for sample in samples:
                self._prove_on(sample.to(self.device))
        finally:
            model.train(was_training)

    def _prove_on(self, sample: Batch) -> None:
        expected_BTD = self.method.hidden_states(self.attached, sample.token_ids_BT)
        if not torch.isfinite(expected_BTD).all():
            raise SelfCheckError("The tuned model's results are not finite. Use a lower learning rate.")
        if self._fused is not None and not self._is_like_plain(self._fused, sample, expected_BTD):
            raise SelfCheckError(
                "The fast path for this architecture gives other results than the plain one. Nothing is "
                "published; please report it."
            )
        if self.head_weight_VD is not None and not self._is_product_with(self.head_weight_VD, sample):
            raise SelfCheckError(
                "The model's output layer gives other logits than the loss was computed from. Nothing is "
                "published; please report it."
            )

    def _is_like_plain(self, fused: FusedLlama, sample: Batch, expected_BTD: torch.Tensor) -> bool:
        """Whether the fast path gives a sample's hidden states, of all tokens and of some.

        The second time with two rows of one beginning, which is shared, and different ends.
        """
        token_ids_BT = sample.token_ids_BT
        num_shared = token_ids_BT.shape[1] // 2
        other_1T = torch.cat([token_ids_BT[:1, :num_shared], token_ids_BT[:1, num_shared:].flip(1)], dim=1)
        rows_2T = torch.cat([token_ids_BT[:1], other_1T])
        wanted_2T = torch.ones_like(rows_2T[:, num_shared:], dtype=torch.bool)
        wanted_2T[:, 1::3] = False

        def by_plain(whole_BTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            other_1TD = self.method.hidden_states(self.attached, other_1T)
            own_2TD = torch.cat([whole_BTD[:1], other_1TD])[:, num_shared:]
            return whole_BTD, own_2TD[wanted_2T]

        found = (
            fused.hidden_states(token_ids_BT),
            fused.wanted_hidden_states(rows_2T, wanted_2T, num_shared=num_shared),
        )
        expected = by_plain(expected_BTD)
        if all(map(agrees, found, expected)):
            return True
        if not is_low_precision(expected_BTD):
            return False
        with ComputesInFloat32():
            exact = by_plain(self.method.hidden_states(self.attached, token_ids_BT))
        return all(
            agrees(fast, plain) or is_as_exact(fast, plain, of_float32)
            for fast, plain, of_float32 in zip(found, expected, exact, strict=True)
        )

    @torch.no_grad()
    def _start_logits(self) -> torch.Tensor:
        return self.logits(self.sample)

    @torch.no_grad()
    def _find_fused(self, sample: Batch) -> FusedLlama | None:
        """Return the fast path when there is one, it holds all that is trained, and it agrees on a row."""
        expected_BTD = self.method.hidden_states(self.attached, sample.token_ids_BT)
        fused = fuse(self.method, self.attached)
        if fused is None:
            return None
        return fused if self._is_like_plain(fused, sample, expected_BTD) else None

    def _find_plain_head(self, sample: Batch) -> torch.Tensor | None:
        """Return the output layer's weight when logits are its product with the hidden states alone.

        Some models scale, cap or shift their logits. The configuration names the usual ways, which a sample
        of small logits would not show; the sample shows the others.
        """
        head = self.attached.causal_lm.get_output_embeddings()
        if type(head) is not torch.nn.Linear or head.bias is not None:
            return None
        config = self.attached.causal_lm.config
        if any(getattr(config, name, None) not in (None, 1.0) for name in _LOGIT_TRANSFORMS):
            return None
        return head.weight if self._is_product_with(head.weight, sample) else None

    @torch.no_grad()
    def _is_product_with(self, head_weight_VD: torch.Tensor, sample: Batch) -> bool:
        """Whether logits are the product of hidden states and a weight, in float32: a soft cap passes for
        rounding in bf16."""
        with ComputesInFloat32():
            hidden_BTD = self.method.hidden_states(self.attached, sample.token_ids_BT)
            return agrees(hidden_BTD @ head_weight_VD.T, self.logits(sample))


def _widen_gradient(parameter: torch.nn.Parameter) -> None:
    gradient, parameter.grad = parameter.grad, None
    parameter.grad_dtype = torch.float32
    parameter.grad = gradient.float()
