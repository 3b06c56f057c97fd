"""What every way to tune a model must offer. The rest of the service knows methods only by this.

A method's file holds one subclass of `Method` and, as `METHOD`, its only instance. No file here may
import torch, transformers or peft at its top: the API reads the parameters without them.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict

from luthier.core.specs import BaseFacts

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


class MethodParams(BaseModel):
    """Base of every method's `Params`: the `tuning` object of a job, flat, with `type` in it.

    Every number that a subclass declares also takes "auto".
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    type: str


@dataclass(frozen=True)
class Attached:
    """A base with a method's own parameters on it.

    `model` is what saves and loads (PEFT's wrapper where PEFT has the method); `causal_lm` is the base
    inside it, whose layers the method may have replaced in place.
    """

    model: "torch.nn.Module"
    causal_lm: "PreTrainedModel"

    def named_trained_parameters(self) -> "list[tuple[str, torch.nn.Parameter]]":
        """Return the trained parameters with their names, in an order that depends on the model alone."""
        return [(name, value) for name, value in self.model.named_parameters() if value.requires_grad]

    @property
    def num_trained_parameters(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.numel() for _, parameter in self.named_trained_parameters())


class Method(ABC):
    """One way to tune a model.

    `starts_as_base` says whether a freshly attached model gives the base's own logits.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    Params: ClassVar[type[MethodParams]]
    starts_as_base: ClassVar[bool] = True

    @abstractmethod
    def resolve(self, params: Any, *, base: BaseFacts, num_rows: int) -> MethodParams:
        """Replace every "auto" by a number.

        Args:
            params: an instance of this method's `Params`.
            base: the base to be tuned.
            num_rows: training rows of the job.

        Returns:
            The same parameters without "auto".
        """

    @abstractmethod
    def base_learning_rate(self, params: Any, *, base: BaseFacts) -> float:
        """Return the peak learning rate that a multiplier of 1 stands for."""

    @abstractmethod
    def attach(self, causal_lm: "PreTrainedModel", params: Any, *, seed: int, base_id: str) -> Attached:
        """Put this method's parameters on a base and freeze everything else.

        Args:
            causal_lm: the base; its layers may be replaced in place, its weights are never changed.
            params: resolved parameters.
            seed: decides the initial values.
            base_id: the base's id, recorded in what is saved.

        Returns:
            The attached model.

        Raises:
            InvalidValueError: when the parameters don't fit this base; `param` is `tuning.<field>`.
        """

    @abstractmethod
    def count_parameters(self, causal_lm: "PreTrainedModel", params: Any) -> int:
        """Return how many parameters `attach` would train on this base, by formula, without attaching."""

    @abstractmethod
    def save(self, attached: Attached, folder: Path) -> list[str]:
        """Write the trained weights and their configuration into a folder.

        Args:
            attached: the model to save.
            folder: an existing folder.

        Returns:
            Names of the written files, which decide what the artifact is.
        """

    @abstractmethod
    def load(self, causal_lm: "PreTrainedModel", folder: Path) -> Attached:
        """Put a saved artifact on a base, frozen, ready to answer.

        Args:
            causal_lm: the base that it was trained on.
            folder: an artifact's folder.

        Returns:
            The attached model in evaluation mode.
        """

    def hidden_states(self, attached: Attached, token_ids_BT: "torch.Tensor") -> "torch.Tensor":
        """Run the tuned model up to its output layer.

        Args:
            attached: the model.
            token_ids_BT: int64, padded on the right; causal, so real positions never see the padding.

        Returns:
            hidden_BTD in the model's type.
        """
        body = attached.causal_lm.base_model
        return body(input_ids=token_ids_BT, use_cache=False).last_hidden_state
