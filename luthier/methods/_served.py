"""What an artifact is made of, as servers lay it out: updates of linear layers, bottlenecks, virtual tokens.

Every method reads its own files into these parts, so that whoever serves them never asks which method it is.
Imported lazily, for it needs torch.

Legend: R ranks, K inputs and O outputs of a layer, M bottleneck width, D hidden size, N virtual tokens, H
key/value heads, C head size.
"""

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from luthier.core.errors import ArtifactCorruptError
from luthier.core.shapes import BaseShape
from luthier.methods._peft import CONFIG_NAME, WEIGHTS_NAME

_LORA_NAME = re.compile(r"base_model\.model\.(.+)\.(lora_A\.weight|lora_B\.weight|lora_magnitude_vector)")
# Members of PEFT's configuration that would change what the tensors mean, and which we never set.
_UNKNOWN_WHEN_SET = (
    "rank_pattern",
    "alpha_pattern",
    "fan_in_fan_out",
    "modules_to_save",
    "layers_to_transform",
    "lora_bias",
    "trainable_token_indices",
    "target_parameters",
    "alora_invocation_tokens",
    "use_qalora",
    "layer_replication",
)


@dataclass(frozen=True)
class LowRankPart:
    """`scale * B A` beside a linear layer; a magnitude is what the whole rows are scaled to (DoRA)."""

    module: str
    a_RK: torch.Tensor
    b_OR: torch.Tensor
    scale: float
    magnitude_O: torch.Tensor | None = None


@dataclass(frozen=True)
class BottleneckPart:
    """`up(act(down(x)))` added to a module's result; x is that result, or in parallel the module's input."""

    module: str
    down_MD: torch.Tensor
    down_M: torch.Tensor
    up_DM: torch.Tensor
    up_D: torch.Tensor
    activation: str
    is_parallel: bool


@dataclass(frozen=True)
class ServedParts:
    """All of an artifact; virtual tokens are keys and values of every layer, [H, N, C], or input vectors."""

    low_ranks: tuple[LowRankPart, ...] = ()
    bottlenecks: tuple[BottleneckPart, ...] = ()
    key_values: tuple[tuple[torch.Tensor, torch.Tensor], ...] = field(default=())
    embeddings_ND: torch.Tensor | None = None

    @property
    def num_virtual_tokens(self) -> int:
        """Tokens that lie before every sequence."""
        if self.embeddings_ND is not None:
            return len(self.embeddings_ND)
        return int(self.key_values[0][0].shape[1]) if self.key_values else 0

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All that it holds."""
        found: list[torch.Tensor | None] = [self.embeddings_ND]
        for low_rank in self.low_ranks:
            found += [low_rank.a_RK, low_rank.b_OR, low_rank.magnitude_O]
        for one in self.bottlenecks:
            found += [one.down_MD, one.down_M, one.up_DM, one.up_D]
        found += [part for pair in self.key_values for part in pair]
        return [tensor for tensor in found if tensor is not None]


def read_lora(folder: Path, shape: BaseShape) -> ServedParts | None:
    """Read an adapter in PEFT's layout.

    Returns:
        Its parts; None when its configuration has something that PEFT alone knows.

    Raises:
        ArtifactCorruptError: when the files can't be read or don't fit the base.
    """
    try:
        config = json.loads((folder / CONFIG_NAME).read_bytes())
        weights = load_file(folder / WEIGHTS_NAME)
        if any(config.get(name) for name in _UNKNOWN_WHEN_SET) or config.get("bias", "none") != "none":
            return None
        root = math.sqrt(config["r"]) if config.get("use_rslora") else config["r"]
        parts = _low_ranks(weights, config["lora_alpha"] / root, shape)
        expected = {path for path in shape.linear_shapes if _is_target(path, config["target_modules"])}
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise ArtifactCorruptError("The artifact's LoRA layers don't fit its base.") from error
    has_magnitudes = [part.magnitude_O is not None for part in parts]
    if {part.module for part in parts} != expected or not expected:
        raise ArtifactCorruptError("The artifact's weights do not match the modules of its base.")
    if any(has_magnitudes) != bool(config.get("use_dora")) or len(set(has_magnitudes)) != 1:
        raise ArtifactCorruptError("The artifact's magnitudes do not match its configuration.")
    return ServedParts(low_ranks=parts)


def _low_ranks(weights: dict[str, torch.Tensor], scale: float, shape: BaseShape) -> tuple[LowRankPart, ...]:
    by_module: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in weights.items():
        found = _LORA_NAME.fullmatch(name)
        if found is None:
            raise ArtifactCorruptError("The artifact's weights do not match the modules of its base.")
        by_module.setdefault(found[1], {})[found[2]] = tensor
    parts = []
    for module, tensors in by_module.items():
        a_RK, b_OR = tensors["lora_A.weight"], tensors["lora_B.weight"]
        num_inputs, num_outputs = shape.linear_shapes[module]
        magnitude_O = tensors.get("lora_magnitude_vector")
        fits = a_RK.shape == (b_OR.shape[1], num_inputs) and b_OR.shape[0] == num_outputs
        if not fits or (magnitude_O is not None and magnitude_O.shape != (num_outputs,)):
            raise ArtifactCorruptError("The artifact's LoRA layers don't fit its base.")
        parts.append(LowRankPart(module, a_RK, b_OR, scale, magnitude_O))
    return tuple(parts)


def _is_target(path: str, target: str | list[str]) -> bool:
    """Whether PEFT takes a module for one of an adapter's: a pattern for the whole path, or ends of it."""
    if isinstance(target, str):
        return re.fullmatch(target, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in target)


def read_bottleneck_parts(folder: Path, shape: BaseShape) -> ServedParts:
    """Read an adapter of bottleneck layers (docs/adapter-format.md).

    Raises:
        ArtifactCorruptError: when the files can't be read or don't fit the base.
    """
    from luthier.methods._bottleneck import ACTIVATIONS, FORMAT_VERSION
    from luthier.methods.adapter import ADAPTER_TYPE

    try:
        config: dict[str, Any] = json.loads((folder / CONFIG_NAME).read_bytes())
        weights = load_file(folder / WEIGHTS_NAME)
        is_ours = (config["adapter_type"], config["format_version"]) == (ADAPTER_TYPE, FORMAT_VERSION)
        if not is_ours or config["activation"] not in ACTIVATIONS:
            raise ArtifactCorruptError("The adapter's configuration does not fit this base.")
        size = config["hidden_size"], config["bottleneck_dim"]
        parts = tuple(_bottleneck(one, size, config, weights) for one in config["bottlenecks"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ArtifactCorruptError("The adapter's files can't be read for this base.") from error
    if weights or config["hidden_size"] != shape.hidden_size or not parts:
        raise ArtifactCorruptError("The adapter holds other tensors than this base has places for.")
    return ServedParts(bottlenecks=parts)


def _bottleneck(
    one: dict[str, str], size: tuple[int, int], config: dict[str, Any], weights: dict[str, torch.Tensor]
) -> BottleneckPart:
    hidden, middle = size
    expected = {
        "down.weight": (middle, hidden),
        "down.bias": (middle,),
        "up.weight": (hidden, middle),
        "up.bias": (hidden,),
    }
    tensors = {name: weights.pop(f"{one['name']}.{name}") for name in expected}
    for name, wanted in expected.items():
        if tensors[name].shape != wanted or tensors[name].dtype != torch.float32:
            raise ArtifactCorruptError("A tensor of the adapter has another shape or type.")
    return BottleneckPart(
        module=str(one["module"]),
        down_MD=tensors["down.weight"],
        down_M=tensors["down.bias"],
        up_DM=tensors["up.weight"],
        up_D=tensors["up.bias"],
        activation=config["activation"],
        is_parallel=config["placement"] == "parallel",
    )
