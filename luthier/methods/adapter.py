"""Adapters: bottleneck layers `x + up(act(down(x)))` inside each block, base frozen.

Three placements. `houlsby` (Houlsby et al. 2019, arXiv 1902.00751): after the attention and after the
feed-forward half, on the half's result before it joins the stream. `pfeiffer` (Pfeiffer et al. 2020,
arXiv 2005.00247): after the feed-forward half alone. `parallel` (He et al. 2021, arXiv 2110.04366): the
feed-forward's result plus `up(act(down(its input)))`. `up` starts at zero, so the start equals the base.

Where this differs from the library `adapters`: there `up` starts at random (but in its parallel form), so
that the start only nearly equals the base; its pfeiffer form reads the sum of the stream and the half's
result, ours the half's result; its parallel form reads the stream before the norm and scales the update by
4, ours reads what the feed-forward reads, as in the paper, and does not scale, because Adam's steps don't
depend on such a factor. Houlsby's form is the same. PEFT has no bottleneck layers: docs/adapter-format.md
describes what is saved.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from luthier.core.cost_model import MethodCost
from luthier.core.errors import InvalidValueError
from luthier.core.shapes import BaseShape
from luthier.core.specs import Auto, BaseFacts
from luthier.methods._peft import find_config
from luthier.methods.base import (
    Attached,
    Method,
    MethodParams,
    ServedParts,
    Start,
    Workload,
    adapter_learning_rate,
    resolved,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What `adapter_type` of our configuration says.
ADAPTER_TYPE = "luthier-bottleneck"

_AUTO_DIM = 64

LOADER = '''\
import json
from pathlib import Path

import torch
from safetensors.torch import load_file

ACTIVATIONS = {
    "gelu": torch.nn.functional.gelu,
    "relu": torch.nn.functional.relu,
    "silu": torch.nn.functional.silu,
    "tanh": torch.tanh,
}


def load_adapter(model, folder):
    """Put an artifact's bottleneck layers on its base, a transformers model."""
    config = json.loads((Path(folder) / "adapter_config.json").read_text())
    weights = load_file(Path(folder) / "adapter_model.safetensors", device=str(model.device))
    activation, linear = ACTIVATIONS[config["activation"]], torch.nn.functional.linear

    def act(name, module, args, kwargs, output):
        result = output[0] if isinstance(output, tuple) else output
        x = result
        if config["placement"] == "parallel":
            x = args[0] if args else kwargs["hidden_states"]
        down, up = (
            (weights[f"{name}.{part}.weight"], weights[f"{name}.{part}.bias"]) for part in ("down", "up")
        )
        result = (result + linear(activation(linear(x.float(), *down)), *up)).to(result.dtype)
        return (result, *output[1:]) if isinstance(output, tuple) else result

    for layer in config["bottlenecks"]:
        hook = lambda *call, name=layer["name"]: act(name, *call)
        model.get_submodule(layer["module"]).register_forward_hook(hook, with_kwargs=True)
    return model
'''


class AdapterParams(MethodParams):
    """The `tuning` object of an adapter job."""

    type: Literal["adapter"] = "adapter"
    bottleneck_dim: Annotated[int, Field(ge=1, le=8192)] | Auto = Field(
        "auto", description="Width of each bottleneck, at most the base's hidden size."
    )
    placement: Literal["houlsby", "pfeiffer", "parallel"] = Field(
        "houlsby",
        description="After attention and feed-forward (houlsby), after the feed-forward alone (pfeiffer), or "
        "beside the feed-forward (parallel).",
    )
    activation: Literal["gelu", "relu", "silu", "tanh"] = Field(
        "gelu", description="What stands between down and up."
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] | Auto = Field(
        "auto", description="Share of the update's numbers dropped in training."
    )


class Adapter(Method):
    """Bottleneck layers of our own in every block."""

    name: ClassVar[str] = "adapter"
    title: ClassVar[str] = "Adapter: bottleneck layers inside each block"
    Params: ClassVar[type[MethodParams]] = AdapterParams
    shaping_params: ClassVar[frozenset[str]] = frozenset({"bottleneck_dim", "placement", "activation"})
    library_name: ClassVar[str | None] = None
    loading: ClassVar[str] = (
        "It loads with torch, transformers and safetensors alone: `load_adapter(base, folder)`, where\n\n"
        f"```python\n{LOADER}```"
    )

    def resolve(self, params: AdapterParams, workload: Workload) -> AdapterParams:
        """Replace every "auto": width 64, no dropout.

        Raises:
            InvalidValueError: when the width is above the base's hidden size.
        """
        size = workload.base.hidden_size
        dim = min(_AUTO_DIM, size) if params.bottleneck_dim == "auto" else params.bottleneck_dim
        _check_dim(dim, size)
        dropout = 0.0 if params.dropout == "auto" else params.dropout
        return params.model_copy(update={"bottleneck_dim": dim, "dropout": dropout})

    def base_learning_rate(self, params: AdapterParams, *, base: BaseFacts) -> float:  # noqa: ARG002
        return adapter_learning_rate(base)

    def cost(self, params: AdapterParams, shape: BaseShape) -> MethodCost:
        """Return 2·d·m + d + m for every bottleneck; houlsby has two a block, the others one."""
        size, dim = shape.hidden_size, int(resolved(params.bottleneck_dim))
        _check_dim(dim, size)
        num_sites = (2 if params.placement == "houlsby" else 1) * shape.num_layers
        count = num_sites * (2 * size * dim + size + dim)
        is_plain = params.placement == "parallel" or bool(params.dropout)
        return MethodCost(num_parameters=count, num_saved=count, is_fused=not is_plain)

    def attach(self, causal_lm: "PreTrainedModel", params: AdapterParams, start: Start) -> Attached:
        """Put bottlenecks into every block: `down` drawn from the seed, `up` zero, all float32."""
        import torch

        from luthier.methods._bottleneck import Bottleneck, find_sites, put_on

        size, dim = causal_lm.config.get_text_config().hidden_size, int(resolved(params.bottleneck_dim))
        _check_dim(dim, size)
        sites = find_sites(causal_lm, params.placement)
        causal_lm.requires_grad_(False)
        # Recorded on saving: an artifact names its base by id, never by a path.
        causal_lm.name_or_path = start.base_id
        torch.manual_seed(start.seed)
        bottlenecks = [
            Bottleneck(
                size,
                dim,
                activation=params.activation,
                placement=params.placement,
                dropout=float(resolved(params.dropout)),
            ).to(causal_lm.device)
            for _ in sites
        ]
        put_on(causal_lm, sites, bottlenecks)
        return Attached(model=causal_lm, causal_lm=causal_lm)

    def save(self, attached: Attached, folder: Path) -> list[str]:
        from luthier.methods._bottleneck import write_bottlenecks

        return write_bottlenecks(attached.causal_lm, folder)

    def recognises(self, folder: Path) -> bool:
        return find_config(folder).get("adapter_type") == ADAPTER_TYPE

    def load(self, causal_lm: "PreTrainedModel", folder: Path) -> Attached:
        from luthier.methods._bottleneck import put_on, read_bottlenecks

        sites, bottlenecks, config = read_bottlenecks(causal_lm, folder)
        causal_lm.requires_grad_(False)
        causal_lm.name_or_path = config["base_model_name_or_path"]
        put_on(causal_lm, sites, bottlenecks)
        return Attached(model=causal_lm.eval(), causal_lm=causal_lm)

    def take_weights(self, attached: Attached, folder: Path) -> None:
        from luthier.methods._bottleneck import take_bottlenecks

        take_bottlenecks(attached.causal_lm, folder)

    def read_parts(self, folder: Path, shape: BaseShape) -> ServedParts | None:
        from luthier.methods._bottleneck import read_config_and_parts

        return ServedParts(bottlenecks=read_config_and_parts(folder, shape.hidden_size)[1])


def _check_dim(dim: int, hidden_size: int) -> None:
    if dim > hidden_size:
        raise InvalidValueError(
            f"A bottleneck of {dim} is wider than this base, whose hidden size is {hidden_size}: it adds "
            f"parameters and no freedom. Use {hidden_size} or less.",
            param="tuning.bottleneck_dim",
        )


METHOD = Adapter()
