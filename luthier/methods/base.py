"""The interface of a tuning method. The rest of the service knows methods only by it.

A method's file holds one subclass of `Method` and, as `METHOD`, its only instance. No file here may
import torch, transformers or peft at its top: the API reads the parameters without them.

Shapes: R ranks, K inputs and O outputs of a layer, M bottleneck width, D hidden size, N virtual tokens, H
key/value heads, C head size, B rows, T tokens, V vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict

from luthier.core.errors import ArtifactCorruptError, InvalidValueError
from luthier.core.plugins import discover_plugins
from luthier.core.shapes import BaseShape
from luthier.core.specs import BaseFacts

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from luthier.core.cost_model import MethodCost


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
    """What the initial values of a method's parameters may depend on.

    `seed` decides everything random; `base_id` is recorded in what is saved; `tokenize` turns text into
    the base's token ids, nothing added; `examples` are the token ids of some training rows, in file order.
    """

    seed: int
    base_id: str
    tokenize: Callable[[str], list[int]]
    examples: Sequence[Sequence[int]] = ()


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
        return sum(parameter.numel() for _, parameter in self.named_trained_parameters())


@dataclass(frozen=True)
class LowRankPart:
    """`scale * B A` beside a linear layer; a magnitude is what the whole rows are scaled to (DoRA)."""

    module: str
    a_RK: "torch.Tensor"
    b_OR: "torch.Tensor"
    scale: float
    magnitude_O: "torch.Tensor | None" = None


@dataclass(frozen=True)
class BottleneckPart:
    """`up(act(down(x)))` added to a module's result; x is that result, or in parallel the module's input."""

    module: str
    down_MD: "torch.Tensor"
    down_M: "torch.Tensor"
    up_DM: "torch.Tensor"
    up_D: "torch.Tensor"
    activation: str
    is_parallel: bool


@dataclass(frozen=True)
class ServedParts:
    """What an artifact consists of, the same for every runner and every method.

    Virtual tokens are keys and values of every layer, [H, N, C], or input vectors.
    """

    low_ranks: tuple[LowRankPart, ...] = ()
    bottlenecks: tuple[BottleneckPart, ...] = ()
    key_values: "tuple[tuple[torch.Tensor, torch.Tensor], ...]" = ()
    embeddings_ND: "torch.Tensor | None" = None

    @property
    def num_virtual_tokens(self) -> int:
        if self.embeddings_ND is not None:
            return len(self.embeddings_ND)
        return int(self.key_values[0][0].shape[1]) if self.key_values else 0

    @property
    def tensors(self) -> "list[torch.Tensor]":
        found: list[torch.Tensor | None] = [self.embeddings_ND]
        for low_rank in self.low_ranks:
            found += [low_rank.a_RK, low_rank.b_OR, low_rank.magnitude_O]
        for one in self.bottlenecks:
            found += [one.down_MD, one.down_M, one.up_DM, one.up_D]
        found += [part for pair in self.key_values for part in pair]
        return [tensor for tensor in found if tensor is not None]


class Method(ABC):
    """One way to tune a model.

    `starts_as_base`: a freshly attached model gives the base's own logits. `is_whole_model`: an artifact
    replaces the base's weights instead of adding to them. `auto_passes`: passes that "auto" takes over the
    rows, where most methods take one. `library_name` is what hubs name as the library, `loading` says in
    Markdown how to load an artifact.

    A job may continue from an artifact of the same method. Then `shaping_params`, which decide what the
    saved weights are and mean, are the artifact's; `starting_params`, which decide the initial values alone,
    don't apply; all others are free.
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
        """Return the parameters with a number instead of every "auto"."""

    def num_reserved_positions(self, params: Any, *, base: BaseFacts) -> int:  # noqa: ARG002
        """Return the most positions of the base's context that virtual tokens may take from a row."""
        return 0

    @abstractmethod
    def base_learning_rate(self, params: Any, *, base: BaseFacts) -> float:
        """Return the peak learning rate that a multiplier of 1 stands for."""

    @abstractmethod
    def attach(self, causal_lm: "PreTrainedModel", params: Any, start: Start) -> Attached:
        """Put this method's parameters on a base and freeze everything else.

        Layers of the base may be replaced in place; its weights are never changed.

        Raises:
            InvalidValueError: when the parameters don't fit this base; `param` is `tuning.<field>`.
        """

    @abstractmethod
    def cost(self, params: Any, shape: BaseShape) -> "MethodCost":
        """Return what training takes beside the base, by formula, without torch and without the base.

        `num_parameters` are what `attach` trains.

        Raises:
            InvalidValueError: when the parameters don't fit this base; `param` is `tuning.<field>`.
        """

    @abstractmethod
    def save(self, attached: Attached, folder: Path) -> list[str]:
        """Write the trained weights and their configuration.

        Returns:
            Names of the written files, which decide what the artifact is.
        """

    @abstractmethod
    def recognises(self, folder: Path) -> bool:
        """Whether a folder holds an artifact of this method; true for exactly one method."""

    @abstractmethod
    def load(self, causal_lm: "PreTrainedModel", folder: Path) -> Attached:
        """Put a saved artifact on a base, frozen, in evaluation mode."""

    def take_weights(self, attached: Attached, folder: Path) -> None:  # noqa: ARG002
        """Replace a freshly attached model's initial values by a saved artifact's weights.

        The model has the artifact's shaping parameters. Never called for whole models, which are loaded
        instead of the base.

        Raises:
            ArtifactCorruptError: when its tensors are not those that the model has.
        """
        raise self._stands_alone()

    def read_parts(self, folder: Path, shape: BaseShape) -> ServedParts | None:  # noqa: ARG002
        """Read a saved artifact for a runner; None when only `load` can serve it.

        Never called for whole models.

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
        """Return the vectors before the embedded sequence, [N, D], or None.

        Differentiable with respect to the trained parameters, for paths that run the layers themselves.
        """
        return None

    def virtual_key_values(
        self,
        attached: Attached,  # noqa: ARG002
    ) -> "list[tuple[torch.Tensor, torch.Tensor]] | None":
        """Return what precedes every layer's own keys and values, a pair a layer, each [H, N, C]; or None.

        Differentiable with respect to the trained parameters. The keys have no rotary positions but those
        they were trained with.
        """
        return None

    def _stands_alone(self) -> ArtifactCorruptError:
        return ArtifactCorruptError(f"An artifact of {self.name} is a whole model and needs no base.")


@cache
def discover() -> dict[str, Method]:
    """Return every method by its name, in the order of the names. A new file is a new method."""
    return discover_plugins("luthier.methods", [str(Path(__file__).parent)], "METHOD")


def method_of_artifact(folder: Path) -> Method:
    """Return the method that made an artifact.

    Raises:
        ArtifactCorruptError: when no method recognises it.
    """
    for method in discover().values():
        if method.recognises(folder):
            return method
    raise ArtifactCorruptError("The artifact's configuration names no known method.")


def check_room(num_virtual_tokens: int, context_length: int) -> None:
    """Refuse virtual tokens that leave no position for a real one."""
    if num_virtual_tokens >= context_length:
        raise InvalidValueError(
            f"{num_virtual_tokens} virtual tokens leave no room for a real one: this base has "
            f"{context_length} positions. Use fewer.",
            param="tuning.num_virtual_tokens",
        )


def resolved(value: Any) -> Any:
    """Return a number that must no longer be "auto"."""
    if value == "auto":
        raise InvalidValueError('"auto" must be resolved before a method is attached.', param="tuning")
    return value


def adapter_learning_rate(base: BaseFacts) -> float:
    """Return the peak rate of small layers beside the base's: lower for wider models."""
    if base.hidden_size <= 1024:
        return 1e-3
    return 4e-4 if base.hidden_size <= 2048 else 2e-4
