"""A base with its method attached, seen as what training needs: rows in, loss out.

Legend: B rows, T tokens, D hidden size, V vocabulary.
"""

from collections.abc import Iterator, Sequence

import torch

from luthier.core.errors import SelfCheckError
from luthier.methods import Attached, Method
from luthier.modeling.fused_llama import FusedLlama, fuse
from luthier.training.batches import Batch
from luthier.training.loss import Loss, full_logits_loss, gather_supervised, head_loss

# What replaces a part of the model must give its results this well, as the norm of the gap relative to the
# norm of the results. In bf16 either path is about 0.03 away from float32; a wrong one would be near 1.
_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.1}

# Numbers whose gradients lie in float32 at a time where masters are updated: 16 Mi of them are 64 MiB.
_GROUP_NUMBERS = 16 * 1024 * 1024


class Trainee:
    """The model in training.

    `parameters` are what the optimizer updates, always float32. Where a trained weight is float32 itself,
    it is that weight. Where it is not (whole models in bf16), it is a float32 master beside the weight:
    the gradients come from the weight, the update is made to the master, and the weight is its rounded
    copy. An update in bf16 itself would be lost: it has 8 significant bits.

    Args:
        method: how it is tuned.
        attached: the base with the method's parameters.
        device: where it lies.
        sample: a short batch on which shortcuts are tried out.
    """

    def __init__(self, method: Method, attached: Attached, device: str, sample: Batch) -> None:
        self.method = method
        self.attached = attached
        self.device = device
        self.sample = sample.to(device)
        named = attached.named_trained_parameters()
        self._names, self._weights = [name for name, _ in named], [weight for _, weight in named]
        self.parameters = [_master_of(weight) for weight in self._weights]
        self._has_masters = any(p is not w for p, w in zip(self.parameters, self._weights, strict=True))
        # Sums in float32 over the parts of a step; None until the step has a second part.
        self._sums: list[torch.Tensor | None] | None = None
        if self._has_masters:
            for index, weight in enumerate(self._weights):
                weight.register_post_accumulate_grad_hook(lambda _, i=index: self._gradient_came(i))
        was_training = attached.model.training
        attached.model.eval()
        self._fused = self._find_fused(self.sample)
        self._head_weight_VD = self._find_plain_head(self.sample)
        # A whole model's training overwrites the base, so what it was must be known before.
        self.start_logits_BTV = self._start_logits() if method.is_whole_model else None
        attached.model.train(was_training)

    @property
    def path(self) -> str:
        """Which code runs the layers: `fused` or `plain`."""
        return "plain" if self._fused is None else "fused"

    @property
    def named_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        """The float32 parameters with the names of the weights that they stand for."""
        return list(zip(self._names, self.parameters, strict=True))

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
        hidden_BTD = self._hidden_states(batch.token_ids_BT)
        hidden_ND, targets_N = gather_supervised(hidden_BTD, batch)
        return head_loss(hidden_ND, self._head_weight_VD, targets_N)

    def logits(self, batch: Batch) -> torch.Tensor:
        """Return logits_BTV as the whole model gives them."""
        return self.method.logits(self.attached, batch.token_ids_BT.to(self.device))

    def clear_gradients(self) -> None:
        """Forget all gradients."""
        self._sums = None
        for tensor in (*self.parameters, *self._weights):
            tensor.grad = None

    def add_gradients(self, loss: torch.Tensor) -> None:
        """Add the gradients of one part of a step to those of the parts before it.

        Args:
            loss: the part's share of the step's loss.
        """
        if self._has_masters and self._sums is None and any(w.grad is not None for w in self._weights):
            # The second part: from here on sums are float32, and no gradient outlives its addition.
            self._sums = [None] * len(self._weights)
            for index in range(len(self._weights)):
                self._gradient_came(index)
        loss.backward()

    @property
    def gradients(self) -> list[torch.Tensor]:
        """The step's gradients so far, in the type in which they lie; none for parameters that got none."""
        found = [weight.grad for weight in self._weights] if self._sums is None else self._sums
        return [gradient for gradient in found if gradient is not None]

    def updates(self) -> Iterator[list[torch.nn.Parameter]]:
        """Hand out the parameters in groups with their gradients in place, each to be updated at once.

        Only one group's gradients lie in float32 at a time where masters are kept. After a group is
        updated its gradients are dropped and its weights follow.

        Yields:
            Parameters of which some have gradients; their optimizer may hold more.
        """
        if not self._has_masters:
            yield self.parameters
            self.clear_gradients()
            return
        for group in self._groups():
            for index in group:
                self.parameters[index].grad = self._take_gradient(index)
            yield [self.parameters[index] for index in group]
            for index in group:
                self.parameters[index].grad = None
                self._refresh(index)
        self._sums = None

    def refresh(self) -> None:
        """Let all weights follow their float32 parameters."""
        for index in range(len(self._weights)):
            self._refresh(index)

    @torch.no_grad()
    def prove_shortcuts(self, samples: Sequence[Batch]) -> None:
        """Compare every shortcut in use with the whole model, with the parameters as they are now.

        At the start an update may be zero, and then a shortcut that gets it wrong agrees too.

        Args:
            samples: rows to compare on.

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
        if self._fused is not None and not _agree(
            self._fused.hidden_states(sample.token_ids_BT), expected_BTD
        ):
            raise SelfCheckError(
                "The fast path for this architecture gives other results than the plain one. Nothing is "
                "published; please report it."
            )
        if self._head_weight_VD is None:
            return
        if not _agree(expected_BTD @ self._head_weight_VD.T, self.logits(sample)):
            raise SelfCheckError(
                "The model's output layer gives other logits than the loss was computed from. Nothing is "
                "published; please report it."
            )

    def _groups(self) -> Iterator[list[int]]:
        """Cut the parameters, in their order, into groups of about `_GROUP_NUMBERS`."""
        group: list[int] = []
        size = 0
        for index, parameter in enumerate(self.parameters):
            if group and size + parameter.numel() > _GROUP_NUMBERS:
                yield group
                group, size = [], 0
            group.append(index)
            size += parameter.numel()
        yield group

    def _gradient_came(self, index: int) -> None:
        """Move a weight's gradient into the float32 sum, once the step has sums."""
        weight = self._weights[index]
        if self._sums is None or weight.grad is None:
            return
        so_far = self._sums[index]
        if so_far is None:
            self._sums[index] = weight.grad.float()
        else:
            so_far.add_(weight.grad)
        weight.grad = None

    def _take_gradient(self, index: int) -> torch.Tensor | None:
        if self._sums is not None:
            gradient, self._sums[index] = self._sums[index], None
            return gradient
        weight = self._weights[index]
        gradient, weight.grad = weight.grad, None
        return None if gradient is None else gradient.float()

    @torch.no_grad()
    def _refresh(self, index: int) -> None:
        if self.parameters[index] is not self._weights[index]:
            self._weights[index].copy_(self.parameters[index])

    @torch.no_grad()
    def _start_logits(self) -> torch.Tensor:
        return self.logits(self.sample)

    def _hidden_states(self, token_ids_BT: torch.Tensor) -> torch.Tensor:
        if self._fused is not None:
            return self._fused.hidden_states(token_ids_BT)
        return self.method.hidden_states(self.attached, token_ids_BT)

    @torch.no_grad()
    def _find_fused(self, sample: Batch) -> FusedLlama | None:
        """Return the fast path when there is one, it holds all that is trained, and it agrees on a row."""
        if self._has_masters or self.method.is_whole_model:
            # It would rearrange the very weights that are trained.
            return None
        expected_BTD = self.method.hidden_states(self.attached, sample.token_ids_BT)
        fused = fuse(self.attached.causal_lm)
        if fused is None or {id(p) for p in fused.parameters} != {id(w) for w in self._weights}:
            return None
        return fused if _agree(fused.hidden_states(sample.token_ids_BT), expected_BTD) else None

    @torch.no_grad()
    def _find_plain_head(self, sample: Batch) -> torch.Tensor | None:
        """Return the output layer's weight when logits are its product with the hidden states alone.

        Some models scale, cap or shift their logits. Trying it on a row tells, for any architecture.
        """
        head = self.attached.causal_lm.get_output_embeddings()
        if type(head) is not torch.nn.Linear or head.bias is not None:
            return None
        found_BTV = head(self.method.hidden_states(self.attached, sample.token_ids_BT))
        return head.weight if _agree(found_BTV, self.logits(sample)) else None


def _master_of(weight: torch.nn.Parameter) -> torch.nn.Parameter:
    if weight.dtype == torch.float32:
        return weight
    return torch.nn.Parameter(weight.detach().float())


def _agree(found: torch.Tensor, expected: torch.Tensor) -> bool:
    gap = (found.float() - expected.float()).norm()
    return bool(gap <= _TOLERANCES[expected.dtype] * expected.float().norm())
