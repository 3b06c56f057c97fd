"""IA3: learned factors of keys, values and the feed-forward's input (Liu et al. 2022, arXiv 2205.05638)."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from luthier.core.cost_model import MethodCost
from luthier.core.shapes import BaseShape
from luthier.core.specs import BaseFacts
from luthier.methods._peft import PeftMethod, attach_peft, write_adapter
from luthier.methods.base import Attached, MethodParams, Start, Workload

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TARGETS, _FEED_FORWARD = ["k_proj", "v_proj", "down_proj"], ["down_proj"]


class Ia3Params(MethodParams):
    """The `tuning` object of an IA3 job."""

    type: Literal["ia3"] = "ia3"


class Ia3(PeftMethod):
    """Factors held by PEFT."""

    name: ClassVar[str] = "ia3"
    peft_type: ClassVar[str] = "IA3"
    title: ClassVar[str] = "IA3: factors of keys, values and the feed-forward's input"
    Params: ClassVar[type[MethodParams]] = Ia3Params
    shaping_params: ClassVar[frozenset[str]] = frozenset()

    def resolve(self, params: Ia3Params, workload: Workload) -> Ia3Params:
        return params

    def base_learning_rate(self, params: Any, *, base: BaseFacts) -> float:
        return 5e-2

    def cost(self, params: Any, shape: BaseShape) -> MethodCost:
        ends = {name: name.rpartition(".")[2] for name in shape.linear_shapes}
        count = sum(
            shape.linear_shapes[name][0 if end in _FEED_FORWARD else 1]
            for name, end in ends.items()
            if end in _TARGETS
        )
        return MethodCost(num_parameters=count, num_saved=count, is_fused=False)

    def attach(self, causal_lm: "PreTrainedModel", params: Any, start: Start) -> Attached:
        from peft import IA3Config

        config = IA3Config(
            task_type="CAUSAL_LM",
            base_model_name_or_path=start.base_id,
            target_modules=_TARGETS,
            feedforward_modules=_FEED_FORWARD,
        )
        return attach_peft(causal_lm, config)

    def save(self, attached: Attached, folder: Path) -> list[str]:
        from peft import get_peft_model_state_dict

        weights = get_peft_model_state_dict(attached.model, save_embedding_layers=False)
        return write_adapter(folder, weights, attached.model.peft_config["default"].to_dict())


METHOD = Ia3()
