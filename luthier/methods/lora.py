"""LoRA: `W + scale * B A` at chosen linear layers, base frozen (Hu et al. 2021, arXiv 2106.09685).

`A` starts random and `B` at zero, so the start equals the base. `scale` is alpha/r, or alpha/sqrt(r)
with rsLoRA (Kalajdzievski 2023, arXiv 2312.03732). DoRA (Liu et al. 2024, arXiv 2402.09353) trains a
magnitude per output beside the direction. PEFT holds the layers, so what is saved loads in PEFT.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, field_validator

from luthier.core.cost_model import MethodCost
from luthier.core.errors import ArtifactCorruptError, InvalidValueError
from luthier.core.shapes import BaseShape
from luthier.core.specs import Auto, BaseFacts
from luthier.methods._layers import (
    Selection,
    check_pattern,
    choose_layers,
    has_experts,
    linear_shapes,
    shortest_names,
)
from luthier.methods._peft import PeftMethod, attach_peft, find_config, write_adapter
from luthier.methods.base import (
    Attached,
    MethodParams,
    ServedParts,
    Start,
    Workload,
    adapter_learning_rate,
    resolved,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Found on SmolLM2-135M: see base_learning_rate.
_AUTO_RANK = 16

# Members of PEFT's configuration under which it trains weights of the base.
_MORE_THAN_UPDATES = (
    "modules_to_save",
    "target_parameters",
    "trainable_token_indices",
    "layer_replication",
)


class LoraParams(MethodParams):
    """The `tuning` object of a LoRA job."""

    type: Literal["lora"] = "lora"
    rank: Annotated[int, Field(ge=1, le=256)] | Auto = Field("auto", description="Width of A and B.")
    alpha: Annotated[float, Field(gt=0, le=1024)] | Auto = Field(
        "auto", description="Scale of the update, divided by the rank; twice the rank by default."
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] | Auto = Field(
        "auto", description="Share of A's inputs dropped in training."
    )
    target_modules: Selection = Field(
        "all-linear",
        description='"all-linear", "attention", "mlp", a list of layer names, or a regular expression.',
    )
    use_rslora: bool = Field(False, description="Divide alpha by the square root of the rank.")
    use_dora: bool = Field(False, description="Train magnitude and direction apart (DoRA).")
    quantization: Literal["int8", "nf4"] | None = Field(
        None, description='Type of the frozen weights: "int8" and "nf4" only where the device can, else null.'
    )

    _pattern_compiles = field_validator("target_modules")(check_pattern)


class Lora(PeftMethod):
    """Low-rank updates of linear layers, held by PEFT."""

    name: ClassVar[str] = "lora"
    title: ClassVar[str] = "LoRA: low-rank updates of linear layers"
    Params: ClassVar[type[MethodParams]] = LoraParams
    peft_type: ClassVar[str] = "LORA"
    shaping_params: ClassVar[frozenset[str]] = frozenset(
        {"rank", "alpha", "target_modules", "use_rslora", "use_dora"}
    )

    def resolve(self, params: LoraParams, workload: Workload) -> LoraParams:  # noqa: ARG002
        """Replace every "auto": rank 16, alpha twice the rank, no dropout."""
        rank = _AUTO_RANK if params.rank == "auto" else params.rank
        alpha = 2.0 * rank if params.alpha == "auto" else params.alpha
        dropout = 0.0 if params.dropout == "auto" else params.dropout
        return params.model_copy(update={"rank": rank, "alpha": alpha, "dropout": dropout})

    def base_learning_rate(self, params: LoraParams, *, base: BaseFacts) -> float:  # noqa: ARG002
        """Return the peak rate: about ten times that of full tuning, lower for wider models."""
        return adapter_learning_rate(base)

    def cost(self, params: LoraParams, shape: BaseShape) -> MethodCost:
        """Return the sum of rank * (inputs + outputs) over the chosen layers; DoRA adds the outputs."""
        chosen = choose_layers(shape.linear_shapes, params.target_modules, has_experts=shape.has_experts)
        rank = int(resolved(params.rank))
        _check_rank(rank, chosen)
        is_fused = not params.use_dora and not params.dropout
        count = sum(rank * (inputs + outputs) for inputs, outputs in chosen.values())
        if params.use_dora:
            count += sum(outputs for _, outputs in chosen.values())
        return MethodCost(num_parameters=count, num_saved=count, is_fused=is_fused)

    def attach(self, causal_lm: "PreTrainedModel", params: LoraParams, start: Start) -> Attached:
        """Replace the chosen layers by PEFT's, with A drawn from the seed and B zero."""
        import torch
        from peft import LoraConfig

        shapes = linear_shapes(causal_lm)
        chosen = choose_layers(shapes, params.target_modules, has_experts=has_experts(causal_lm))
        rank = int(resolved(params.rank))
        _check_rank(rank, chosen)
        config = LoraConfig(
            task_type="CAUSAL_LM",
            base_model_name_or_path=start.base_id,
            r=rank,
            lora_alpha=resolved(params.alpha),
            lora_dropout=resolved(params.dropout),
            target_modules=shortest_names(chosen, shapes),
            use_rslora=params.use_rslora,
            use_dora=params.use_dora,
            bias="none",
        )
        torch.manual_seed(start.seed)
        return attach_peft(causal_lm, config)

    def save(self, attached: Attached, folder: Path) -> list[str]:
        from peft import get_peft_model_state_dict

        weights = get_peft_model_state_dict(
            attached.model, adapter_name="default", save_embedding_layers=False
        )
        return write_adapter(folder, weights, attached.model.peft_config["default"].to_dict())

    def load(self, causal_lm: "PreTrainedModel", folder: Path) -> Attached:
        """Let PEFT load it.

        Raises:
            ArtifactCorruptError: when it also trains weights of the base, which other models share.
        """
        config = find_config(folder)
        if config.get("bias", "none") != "none" or any(config.get(name) for name in _MORE_THAN_UPDATES):
            raise ArtifactCorruptError("The artifact trains more than low-rank updates, which is not served.")
        return super().load(causal_lm, folder)

    def take_weights(self, attached: Attached, folder: Path) -> None:
        from luthier.methods._lora_layers import take_lora

        take_lora(attached, folder)

    def read_parts(self, folder: Path, shape: BaseShape) -> ServedParts | None:
        from luthier.methods._lora_layers import read_lora

        return read_lora(folder, shape)


def _check_rank(rank: int, chosen: dict[str, tuple[int, int]]) -> None:
    limit = min(min(shape) for shape in chosen.values())
    if rank <= limit:
        return
    name = next(path for path, shape in chosen.items() if min(shape) == limit)
    raise InvalidValueError(
        f"Rank {rank} is above what the layer {name} can hold: a rank beyond {limit} adds parameters and no "
        f"freedom. Use {limit} or less, or leave that layer out of target_modules.",
        param="tuning.rank",
    )


METHOD = Lora()
