"""The LoRA layers of a saved artifact, as parts for runners. Imported inside functions alone: it needs torch.

Shapes: R ranks, K inputs and O outputs of a layer.
"""

import json
import math
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from luthier.core.errors import ArtifactCorruptError
from luthier.core.shapes import BaseShape
from luthier.methods._peft import CONFIG_NAME, WEIGHTS_NAME
from luthier.methods.base import Attached, LowRankPart, ServedParts

_ADAPTER = "default"
_LORA_NAME = re.compile(r"base_model\.model\.(.+)\.(lora_A\.weight|lora_B\.weight|lora_magnitude_vector)")
# Members of PEFT's configuration that would change what the tensors mean, and which we never set.
_UNKNOWN_WHEN_SET = (
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "layers_to_transform",
    "lora_bias",
    "trainable_token_indices",
    "target_parameters",
    "alora_invocation_tokens",
    "use_qalora",
    "layer_replication",
)


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


def take_lora(attached: Attached, folder: Path) -> None:
    """Fill the layers of an attached model with a saved adapter's tensors.

    Raises:
        ArtifactCorruptError: when the tensors are not those of these layers.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    model = attached.model
    try:
        weights = load_file(folder / WEIGHTS_NAME)
    except (OSError, SafetensorError) as error:
        raise ArtifactCorruptError("The artifact's weights can't be read.") from error
    wanted = get_peft_model_state_dict(model, adapter_name=_ADAPTER, save_embedding_layers=False)
    if {name: part.shape for name, part in wanted.items()} != {n: part.shape for n, part in weights.items()}:
        raise ArtifactCorruptError("The artifact's LoRA layers are not those of this model.")
    set_peft_model_state_dict(model, weights, adapter_name=_ADAPTER)
