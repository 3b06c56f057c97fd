"""The model of a job: a base with its method attached, and the code that computes its loss.

Legend: B rows, T tokens, N supervised tokens, D hidden size, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, ClassVar

import torch

from luthier.core.errors import SelfCheckError
from luthier.core.plugins import load_entry_points
from luthier.methods import Attached, Method, MethodParams
from luthier.modeling.head_loss import OutputLayer, gather_supervised, head_loss, head_token_losses
from luthier.modeling.training_protocols import (
    MIN_SAVED_TOKENS,
    Batch,
    Loss,
    TrainingAccelerator,
    TrainingModel,
)
from luthier.training.model.agreement import LOW_PRECISION, ComputesInFloat32, agrees, is_as_exact

_ENTRY_POINTS = "luthier.training"
# What configurations call a cap or a factor on logits: Gemma 2 and 3, Cohere, Granite.
_LOGIT_TRANSFORMS = ("final_logit_softcapping", "logit_scale", "logits_scaling")


@cache
def find_accelerators() -> tuple[TrainingAccelerator, ...]:
    """Return the installed accelerators, in the order of their entry points' names."""
    return tuple(accelerator() for _, accelerator in load_entry_points(_ENTRY_POINTS))


class ReferenceModel:
    """The reference path, correct on every architecture and device: transformers with SDPA, and PEFT."""

    def __init__(self, method: Method, attached: Attached, sample: Batch) -> None:
        self._method, self._attached = method, attached
        self.head = self._find_head(sample)

    def loss(self, batch: Batch) -> Loss:
        """Score the supervised tokens."""
        if self.head is not None:
            hidden_ND, targets_N = self._supervised_hidden_states(batch)
            return head_loss(hidden_ND, self.head, targets_N)
        logits_NV, targets_N = self._supervised_logits(batch)
        nll_sum = torch.nn.functional.cross_entropy(logits_NV.float(), targets_N, reduction="sum")
        num_right = int((logits_NV.argmax(dim=-1) == targets_N).sum())
        return Loss(nll_sum, num_right, targets_N.shape[0])

    def token_losses(self, batch: Batch) -> torch.Tensor:
        """Return the negative log-likelihood of each supervised token, float32 [N]."""
        if self.head is not None:
            hidden_ND, targets_N = self._supervised_hidden_states(batch)
            return head_token_losses(hidden_ND, self.head, targets_N)
        logits_NV, targets_N = self._supervised_logits(batch)
        return torch.nn.functional.cross_entropy(logits_NV.float(), targets_N, reduction="none")

    def logits(self, batch: Batch) -> torch.Tensor:
        """Return logits_NV of the positions that predict a supervised token."""
        return self._supervised_logits(batch)[0]

    def agrees_on_head(self, sample: Batch) -> bool:
        """Return whether the loss's logits, by the output layer's weight alone, are still the model's."""
        return self.head is None or self._is_product_with(self.head.weight_VD, sample)

    def _supervised_hidden_states(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        # Counted before the batch is on a GPU, which would have to be waited for.
        num_needed = batch.num_needed
        batch = batch.to(self._attached.causal_lm.device)
        hidden_BTD = self._method.hidden_states(self._attached, batch.token_ids_BT[:, :num_needed])
        return gather_supervised(hidden_BTD, batch)

    def _supervised_logits(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        batch = batch.to(self._attached.causal_lm.device)
        return gather_supervised(self._method.logits(self._attached, batch.token_ids_BT), batch)

    def _find_head(self, sample: Batch) -> OutputLayer | None:
        """Return the output layer when logits are its product with the hidden states and no more.

        Some models scale, cap or shift their logits. The configuration names the usual ways, which a sample
        of small logits would not show; the sample shows the others.
        """
        layer = self._attached.causal_lm.get_output_embeddings()
        if type(layer) is not torch.nn.Linear or layer.bias is not None:
            return None
        config = self._attached.causal_lm.config
        if any(getattr(config, name, None) not in (None, 1.0) for name in _LOGIT_TRANSFORMS):
            return None
        return OutputLayer(layer.weight) if self._is_product_with(layer.weight, sample) else None

    @torch.no_grad()
    def _is_product_with(self, weight_VD: torch.Tensor, sample: Batch) -> bool:
        """Compare in float32: in bf16 the effect of a soft cap is within rounding."""
        with ComputesInFloat32():
            hidden_BTD = self._method.hidden_states(self._attached, sample.token_ids_BT)
            logits_BTV = self._method.logits(self._attached, sample.token_ids_BT)
            return agrees(hidden_BTD @ weight_VD.T, logits_BTV)


class JobModel:
    """A tuned model in training, computed by the first accelerator that knows it, else by transformers.

    Args:
        sample: a short batch on which an accelerator is compared with the reference path.
    """

    def __init__(self, method: Method, attached: Attached, device: str, sample: Batch) -> None:
        self.method = method
        self.attached = attached
        self.device = device
        self.sample = sample.to(device)
        self.named_parameters = attached.named_trained_parameters()
        self.parameters = [parameter for _, parameter in self.named_parameters]
        with self.evaluation_mode(), torch.no_grad():
            self.reference = ReferenceModel(method, attached, self.sample)
            self.accelerated = self._find_accelerated()
            # Training a whole model overwrites the base, so its logits are computed before.
            self.start_logits_BTV = self.logits(self.sample) if method.is_whole_model else None
        # Logits of the sample before the first step, of a job that continues another model.
        self.parent_logits_BTV: torch.Tensor | None = None

    @property
    def path(self) -> str:
        """The code that runs the layers, as reports name it: `fused` by an accelerator, else `plain`."""
        return "plain" if self.accelerated is None else "fused"

    @contextmanager
    def evaluation_mode(self) -> Iterator[None]:
        """Switch dropout off inside the block."""
        module = self.attached.model
        was_training = module.training
        module.eval()
        try:
            yield
        finally:
            module.train(was_training)

    def loss(self, batch: Batch) -> Loss:
        """Score a batch's supervised tokens; differentiable unless gradients are switched off."""
        return self._path.loss(batch)

    def row_log_likelihoods(self, batch: Batch) -> torch.Tensor:
        """Return the log-likelihood of each row's supervised tokens together, float32 [B]; differentiable."""
        nll_N = self._path.token_losses(batch)
        row_of_N = batch.supervised_BT[:, 1:].nonzero()[:, 0].to(nll_N.device)
        sums_B = torch.zeros(len(batch.supervised_BT), dtype=torch.float32, device=nll_N.device)
        return sums_B.index_add(0, row_of_N, -nll_N)

    def logits(self, batch: Batch) -> torch.Tensor:
        """Return logits_BTV of the whole model by the reference path."""
        return self.method.logits(self.attached, batch.token_ids_BT.to(self.device))

    def clear_gradients(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None
            parameter.grad_dtype = parameter.dtype

    def add_gradients(self, loss: torch.Tensor) -> None:
        """Add the gradients of a micro-batch to those of the micro-batches before it.

        A step of one micro-batch leaves gradients in the type of the parameters. The second one turns the
        sums into float32, to which each bf16 gradient is then added as it is computed.
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
    def verify(self, samples: Sequence[Batch]) -> None:
        """Compare what computes the loss with the whole model, with the parameters as they are now.

        At the start an update may be zero, and code that computes it wrongly would agree too.

        Raises:
            SelfCheckError: when the loss comes from other logits than the model's, or these are not finite.
        """
        with self.evaluation_mode():
            for sample in samples:
                self._verify_on(sample.to(self.device))

    @property
    def _path(self) -> TrainingModel:
        return self.reference if self.accelerated is None else self.accelerated

    def _verify_on(self, sample: Batch) -> None:
        if not torch.isfinite(self.method.hidden_states(self.attached, sample.token_ids_BT)).all():
            raise SelfCheckError("The tuned model's results are not finite. Use a lower learning rate.")
        if self.accelerated is not None and not self._agrees_with_reference(self.accelerated, sample):
            raise SelfCheckError(
                "The accelerator gives other results than the reference path. Nothing is published; please "
                "report it."
            )
        if not self.reference.agrees_on_head(sample):
            raise SelfCheckError(
                "The model's output layer gives other logits than the loss was computed from. Nothing is "
                "published; please report it."
            )

    def _agrees_with_reference(self, accelerated: TrainingModel, sample: Batch) -> bool:
        """Compare logits of all tokens of a sample, and of some tokens of rows with a shared beginning."""
        rows = [_all_supervised(sample.token_ids_BT), _rows_with_shared_beginning(sample.token_ids_BT)]
        return all(self._agrees_on(accelerated, batch) for batch in rows if batch.supervised_BT.any())

    def _agrees_on(self, accelerated: TrainingModel, batch: Batch) -> bool:
        found_NV, expected_NV = accelerated.logits(batch), self.reference.logits(batch)
        if agrees(found_NV, expected_NV):
            return True
        if expected_NV.dtype not in LOW_PRECISION:
            return False
        with ComputesInFloat32():
            exact_NV = self.reference.logits(batch)
        return is_as_exact(found_NV, expected_NV, exact_NV)

    def _find_accelerated(self) -> TrainingModel | None:
        for accelerator in find_accelerators():
            found = accelerator.accelerate(self.method, self.attached, self.sample)
            if found is not None and self._agrees_with_reference(found, self.sample):
                return found
        return None


def _all_supervised(token_ids_BT: torch.Tensor) -> Batch:
    supervised_BT = torch.ones_like(token_ids_BT, dtype=torch.bool)
    supervised_BT[:, 0] = False
    return Batch(token_ids_BT, supervised_BT, token_ids_BT.numel())


def _rows_with_shared_beginning(token_ids_BT: torch.Tensor) -> Batch:
    """Return the first row and rows that differ in the second half, where some tokens are supervised."""
    num_shared = token_ids_BT.shape[1] // 2
    other_1T = torch.cat([token_ids_BT[:1, :num_shared], token_ids_BT[:1, num_shared:].flip(1)], dim=1)
    num_others = -(-MIN_SAVED_TOKENS // max(1, num_shared))
    rows_BT = torch.cat([token_ids_BT[:1], other_1T.expand(num_others, -1)])
    supervised_BT = torch.ones_like(rows_BT, dtype=torch.bool)
    supervised_BT[:, : num_shared + 1] = False
    supervised_BT[:, num_shared + 2 :: 3] = False
    return Batch(rows_BT, supervised_BT, rows_BT.numel())


def _widen_gradient(parameter: torch.nn.Parameter) -> None:
    gradient, parameter.grad = parameter.grad, None
    parameter.grad_dtype = torch.float32
    parameter.grad = gradient.float()


class Untuned(Method):
    """The base itself as a method, so that it is scored as tuned models are."""

    name: ClassVar[str] = "untuned"
    title: ClassVar[str] = "The base as it is"
    Params: ClassVar[type[MethodParams]] = MethodParams

    def _unused(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError("The base has no parameters, and no artifact.")

    resolve = base_learning_rate = attach = cost = save = recognises = load = _unused
