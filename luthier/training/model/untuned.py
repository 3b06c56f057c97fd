"""The base itself in a method's place, so that it can be scored as tuned models are."""

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from luthier.core.cost_model import MethodCost
from luthier.core.shapes import BaseShape
from luthier.core.specs import BaseFacts
from luthier.methods import Attached, Method, MethodParams, Start, Workload

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Untuned(Method):
    """Tunes nothing: no parameters, no artifact. No job can ask for it."""

    name: ClassVar[str] = "untuned"
    title: ClassVar[str] = "The base as it is"
    Params: ClassVar[type[MethodParams]] = MethodParams

    def resolve(self, params: MethodParams, workload: Workload) -> MethodParams:  # noqa: ARG002
        """Return the parameters, of which there are none."""
        return params

    def base_learning_rate(self, params: MethodParams, *, base: BaseFacts) -> float:  # noqa: ARG002
        """Return 0: nothing learns."""
        return 0.0

    def attach(
        self,
        causal_lm: "PreTrainedModel",
        params: MethodParams,  # noqa: ARG002
        start: Start,  # noqa: ARG002
    ) -> Attached:
        """Return the base as it is."""
        return Attached(model=causal_lm, causal_lm=causal_lm)

    def count_parameters(self, causal_lm: "PreTrainedModel", params: MethodParams) -> int:  # noqa: ARG002
        """Return 0."""
        return 0

    def cost(self, params: MethodParams, shape: BaseShape) -> MethodCost:  # noqa: ARG002
        """Return that nothing is trained."""
        return MethodCost(num_parameters=0, num_saved=0)

    def save(self, attached: Attached, folder: Path) -> list[str]:  # noqa: ARG002
        """Write nothing: there is nothing beside the base."""
        return []

    def recognises(self, folder: Path) -> bool:  # noqa: ARG002
        """Return False: no artifact is of this method."""
        return False

    def load(self, causal_lm: "PreTrainedModel", folder: Path) -> Attached:  # noqa: ARG002
        """Return the base as it is."""
        return Attached(model=causal_lm, causal_lm=causal_lm)
