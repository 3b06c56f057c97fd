"""The seam to what trains a model: all that an accelerator has to know.

Legend: B rows, T tokens, N supervised tokens, V vocabulary.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    from luthier.methods import Attached, Method

# Computing a shared beginning separately costs about as much as this many tokens.
MIN_SAVED_TOKENS = 16


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right to the longest of them.

    `token_ids_BT` int64; `supervised_BT` bool, true where the token is to be predicted (never at column
    0, which nothing precedes); `num_tokens` counts real tokens.
    """

    token_ids_BT: "torch.Tensor"
    supervised_BT: "torch.Tensor"
    num_tokens: int

    @property
    def num_needed(self) -> int:
        """Columns that the loss depends on: the last supervised token is predicted from the one before."""
        columns = self._supervised_columns
        return max(1, columns[-1]) if columns else 1

    @property
    def num_shared(self) -> int:
        """Columns at the beginning that are equal in all rows and predict nothing supervised.

        0 where computing them once would save too few tokens.
        """
        num_rows, num_columns = self.token_ids_BT.shape
        columns = self._supervised_columns
        differing = (self.token_ids_BT != self.token_ids_BT[:1]).any(dim=0).nonzero()
        num_equal = int(differing[0]) if len(differing) else num_columns
        found = min(num_equal, columns[0] - 1 if columns else 0)
        return found if found * (num_rows - 1) >= MIN_SAVED_TOKENS else 0

    @cached_property
    def _supervised_columns(self) -> list[int]:
        columns: list[int] = self.supervised_BT.any(dim=0).nonzero()[:, 0].tolist()
        return columns

    def to(self, device: "torch.device | str") -> "Batch":
        """Return the batch with its tensors on a device."""
        return Batch(self.token_ids_BT.to(device), self.supervised_BT.to(device), self.num_tokens)


@dataclass(frozen=True)
class Loss:
    """Sums over a batch's supervised tokens; `nll_sum`, float32, is differentiable."""

    nll_sum: "torch.Tensor"
    num_right: int
    num_supervised: int


class TrainingModel(Protocol):
    """A tuned model as a training step computes it, over the method's own parameters.

    Batches are on the CPU or on the model's device.
    """

    def loss(self, batch: Batch) -> Loss:
        """Score the supervised tokens; one backward pass through the loss is possible."""

    def token_losses(self, batch: Batch) -> "torch.Tensor":
        """Return the negative log-likelihood of each supervised token, float32 [N], row by row.

        Differentiable unless gradients are switched off.
        """

    def logits(self, batch: Batch) -> "torch.Tensor":
        """Return logits_NV of the positions that predict a supervised token, computed as `loss` does."""


class TrainingAccelerator(Protocol):
    """A faster way to compute some models; found by the entry point group `luthier.training`."""

    def accelerate(self, method: "Method", attached: "Attached", sample: Batch) -> TrainingModel | None:
        """Return a model that gives gradients to every trained parameter, or None for what it does not know.

        The caller compares its logits with the reference path's before it is used.

        Args:
            sample: a short batch to try it on.
        """

    def preload(self) -> None:
        """Import and compile what `accelerate` will need, in a process that forks one for each job."""
