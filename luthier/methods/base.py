"""What every way to tune a model must offer. The rest of the service knows methods only by this.

A method's file holds one subclass of `Method` and, as `METHOD`, its only instance. No file here may
import torch, transformers or peft at its top: the API reads the parameters without them.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict

from luthier.core.cost_model import MethodCost
from luthier.core.errors import ArtifactCorruptError
from luthier.core.shapes import BaseShape
from luthier.core.specs import BaseFacts

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from luthier.methods._served import ServedParts


class MethodParams(BaseModel):
    """Base of every method's `Params`: the `tuning` object of a job, flat, with `type` in it.

    Every number that a subclass declares also takes "auto".
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    type: str


@dataclass(frozen=True)
class Workload:
    """What an "auto" may depend on: the base, the training rows, and the memory of the training device."""

    base: BaseFacts
    num_rows: int
    num_tokens: int
    memory_bytes: int | None = None


@dataclass(frozen=True)
class Start:
    """What the first values of a method's parameters may depend on.

    `seed` decides everything random; `base_id` is recorded in what is saved; `tokenize` turns text into
    the base's token ids, nothing added; `examples` are the token ids of some training rows, in file order.
    """

    seed: int
    base_id: str
    tokenize: Callable[[str], list[int]]
    examples: Sequence[Sequence[int]] = ()


class Installed(ABC):
    """An artifact that lies on a base in memory beside others, switched off until it is wanted.

    At most one is on at a time. While all are off the base gives its own results, bit for bit.
    """

    @abstractmethod
    def switch_on(self) -> None:
        """Let the base's next forward passes be those of this artifact."""

    @abstractmethod
    def switch_off(self) -> None:
        """Let the base be itself again."""

    @abstractmethod
    def remove(self) -> None:
        """Take everything off the base and free its memory; the artifact is off."""

    def prefix(self) -> "list[tuple[torch.Tensor, torch.Tensor]]":
        """Return what lies before every sequence of this artifact.

        Returns:
            Keys and values of every layer, each [key/value heads, virtual tokens, head size], in the
            base's type and positions 0 and up; empty where the method has no virtual tokens.
        """
        return []


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

    `starts_as_base` says whether a freshly attached model gives the base's own logits;
    `is_whole_model` whether an artifact replaces the base's weights instead of lying on top of them.
    `auto_passes` is how many passes "auto" takes over the rows where most methods take one.
    `library_name` is the library that hubs shall name, `loading` tells in Markdown how to load an artifact.

    For a job that goes on from an artifact of the same method, every method says which of its parameters
    decide what the saved weights are and mean, `shaping_params`: there they are the artifact's. Those of
    `starting_params` decide the first values alone, of which such a job has none. All others are free.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    Params: ClassVar[type[MethodParams]]
    shaping_params: ClassVar[frozenset[str]]
    starting_params: ClassVar[frozenset[str]] = frozenset()
    starts_as_base: ClassVar[bool] = True
    is_whole_model: ClassVar[bool] = False
    auto_passes: ClassVar[int] = 1
    library_name: ClassVar[str | None] = "peft"
    loading: ClassVar[str] = "Load it with `peft.PeftModel.from_pretrained(base, folder)`."

    @abstractmethod
    def resolve(self, params: Any, workload: Workload) -> MethodParams:
        """Replace every "auto" by a number.

        Args:
            params: an instance of this method's `Params`.

        Returns:
            The same parameters without "auto".
        """

    def num_reserved_positions(self, params: Any, *, base: BaseFacts) -> int:  # noqa: ARG002
        """Return the most positions of the base's context that virtual tokens may take from a row."""
        return 0

    @abstractmethod
    def base_learning_rate(self, params: Any, *, base: BaseFacts) -> float:
        """Return the peak learning rate that a multiplier of 1 stands for."""

    @abstractmethod
    def attach(self, causal_lm: "PreTrainedModel", params: Any, start: Start) -> Attached:
        """Put this method's parameters on a base and freeze everything else.

        Args:
            causal_lm: the base; its layers may be replaced in place, its weights are never changed.

        Raises:
            InvalidValueError: when the parameters don't fit this base; `param` is `tuning.<field>`.
        """

    @abstractmethod
    def count_parameters(self, causal_lm: "PreTrainedModel", params: Any) -> int:
        """Return how many parameters `attach` would train on this base, by formula, without attaching."""

    @abstractmethod
    def cost(self, params: Any, shape: BaseShape) -> MethodCost:
        """Tell what training takes beside the base, by formula, without torch and without the base.

        Returns:
            The method's part; its `num_parameters` are what `count_parameters` returns.

        Raises:
            InvalidValueError: when the parameters don't fit this base; `param` is `tuning.<field>`.
        """

    @abstractmethod
    def save(self, attached: Attached, folder: Path) -> list[str]:
        """Write the trained weights and their configuration into a folder.

        Returns:
            Names of the written files, which decide what the artifact is.
        """

    @abstractmethod
    def recognises(self, folder: Path) -> bool:
        """Whether a folder holds an artifact of this method; true for exactly one method."""

    @abstractmethod
    def load(self, causal_lm: "PreTrainedModel", folder: Path) -> Attached:
        """Put a saved artifact on a base, frozen, ready to answer.

        Returns:
            The attached model in evaluation mode.
        """

    def take_weights(self, attached: Attached, folder: Path) -> None:  # noqa: ARG002
        """Put a saved artifact's weights in place of a freshly attached model's first ones.

        Never called for whole models, whose weights are loaded in the base's place.

        Args:
            attached: what `attach` returned, with the artifact's shaping parameters.

        Raises:
            ArtifactCorruptError: when its tensors are not those that the model has.
        """
        raise ArtifactCorruptError(f"An artifact of {self.name} is a model of its own and lies on no base.")

    def install(
        self,
        causal_lm: "PreTrainedModel",  # noqa: ARG002
        folder: Path,  # noqa: ARG002
        name: str,  # noqa: ARG002
    ) -> Installed:
        """Lay a saved artifact on a base beside others, switched off; never called for whole models.

        Args:
            causal_lm: the base, which may bear other artifacts of any method, all switched off.

        Raises:
            ArtifactCorruptError: when it is a whole model, or its tensors don't fit the base, which is then
                as it was.
        """
        raise ArtifactCorruptError(f"An artifact of {self.name} is a model of its own and lies on no base.")

    def read_parts(self, folder: Path, shape: BaseShape) -> "ServedParts | None":  # noqa: ARG002
        """Read a saved artifact as a server lays it out beside others; never called for whole models.

        Returns:
            Its parts; None when only `install` can serve it.

        Raises:
            ArtifactCorruptError: when its files can't be read or don't fit the base.
        """
        return None

    def hidden_states(self, attached: Attached, token_ids_BT: "torch.Tensor") -> "torch.Tensor":
        """Run the tuned model up to its output layer.

        Args:
            token_ids_BT: int64, padded on the right; causal, so real positions never see the padding.

        Returns:
            hidden_BTD in the model's type, without virtual tokens.
        """
        body = attached.causal_lm.base_model
        return body(input_ids=token_ids_BT, use_cache=False).last_hidden_state

    def logits(self, attached: Attached, token_ids_BT: "torch.Tensor") -> "torch.Tensor":
        """Run the whole tuned model.

        Args:
            token_ids_BT: int64, padded on the right.

        Returns:
            logits_BTV in the model's type, without virtual tokens.
        """
        return attached.model(input_ids=token_ids_BT, use_cache=False).logits

    def virtual_embeddings(self, attached: Attached) -> "torch.Tensor | None":  # noqa: ARG002
        """Return what is put before the embedded sequence, [virtual tokens, hidden size], or None.

        Differentiable with respect to the trained parameters, for paths that run the layers themselves.
        """
        return None

    def virtual_key_values(
        self,
        attached: Attached,  # noqa: ARG002
    ) -> "list[tuple[torch.Tensor, torch.Tensor]] | None":
        """Return what is put before every layer's own keys and values, or None.

        Returns:
            A pair a layer, each [key/value heads, virtual tokens, head size], differentiable with respect
            to the trained parameters. The keys bear no rotary positions but those they were trained with.
        """
        return None
