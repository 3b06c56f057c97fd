"""The LoRA layers of a saved artifact: as parts for runners, or as PEFT's layers beside the base's own.

Layers of an artifact that is off are not in the base: it runs its own modules, bit for bit.
Imported inside functions alone: it needs torch. PEFT, which takes seconds, is for `install` and training.

Shapes: R ranks, K inputs and O outputs of a layer.
"""

import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from luthier.core.errors import ArtifactCorruptError
from luthier.core.shapes import BaseShape
from luthier.methods._peft import CONFIG_NAME, WEIGHTS_NAME
from luthier.methods.base import Attached, Installed, LowRankPart, ServedParts

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel

_ADAPTER = "default"
# What PEFT's wrapper adds to every name.
_PREFIX = "base_model.model."
_Places = list[tuple[torch.nn.Module, str, torch.nn.Module]]
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


class InstalledLora(Installed):
    """LoRA layers that take the places of a base's linear layers while they are on.

    Args:
        layers: the parent module, the name in it, and PEFT's layer, which holds the base's own.
    """

    def __init__(self, layers: _Places) -> None:
        self._layers = layers

    def switch_on(self) -> None:
        for parent, name, layer in self._layers:
            setattr(parent, name, layer)

    def switch_off(self) -> None:
        for parent, name, layer in self._layers:
            setattr(parent, name, layer.base_layer)

    def remove(self) -> None:
        self.switch_off()
        self._layers = []


def install_lora(causal_lm: "PreTrainedModel", folder: Path) -> InstalledLora:
    """Build an artifact's layers on a base that has none, and leave them off.

    Raises:
        ArtifactCorruptError: when the files can't be read or don't fit the base.
    """
    from peft import inject_adapter_in_model

    try:
        config = _read_config(folder)
        weights = load_file(folder / WEIGHTS_NAME, device=str(causal_lm.device))
        inject_adapter_in_model(config, causal_lm, _ADAPTER)
        _fill(causal_lm, weights)
        layers = _find_layers(causal_lm)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        raise ArtifactCorruptError("The artifact's LoRA layers don't fit its base.") from error
    finally:
        _restore(causal_lm)
    return InstalledLora(layers)


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


def _read_config(folder: Path) -> "LoraConfig":
    from peft import LoraConfig

    if not (folder / CONFIG_NAME).is_file():
        # PEFT would look for it on a hub.
        raise ArtifactCorruptError("The artifact's configuration is missing.")
    config = LoraConfig.from_pretrained(str(folder))
    if (
        config.bias != "none"
        or config.modules_to_save
        or config.target_parameters
        or config.trainable_token_indices
        or config.layer_replication
    ):
        raise ArtifactCorruptError("The artifact trains more than low-rank updates, which is not served.")
    config.inference_mode = True
    # The weights come from the file, and some initialisations would change the base's.
    config.init_lora_weights = False
    return config


def _fill(causal_lm: "PreTrainedModel", weights: dict[str, torch.Tensor]) -> None:
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from peft.tuners.tuners_utils import cast_adapter_dtype

    # The embedding question would make PEFT look for the base on a hub.
    wanted = get_peft_model_state_dict(causal_lm, adapter_name=_ADAPTER, save_embedding_layers=False)
    if {_PREFIX + name for name in wanted} != set(weights):
        raise ArtifactCorruptError("The artifact's weights do not match the modules of its base.")
    # As loading by PEFT does: the updates run in float32 whatever the base's type.
    cast_adapter_dtype(causal_lm, _ADAPTER)
    result = set_peft_model_state_dict(causal_lm, weights, adapter_name=_ADAPTER)
    if result.unexpected_keys:
        raise ArtifactCorruptError("The artifact's weights do not match the modules of its base.")


def _find_layers(causal_lm: "PreTrainedModel") -> _Places:
    from peft.tuners.lora import LoraLayer

    layers: _Places = []
    for path, module in causal_lm.named_modules():
        if isinstance(module, LoraLayer):
            parent, _, name = path.rpartition(".")
            layers.append((causal_lm.get_submodule(parent), name, module.eval().requires_grad_(False)))
    return layers


def _restore(causal_lm: "PreTrainedModel") -> None:
    """Leave nothing of PEFT's on the base, however far building came."""
    InstalledLora(_find_layers(causal_lm)).remove()
    if hasattr(causal_lm, "peft_config"):
        del causal_lm.peft_config
