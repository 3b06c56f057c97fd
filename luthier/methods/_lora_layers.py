"""PEFT's LoRA layers of a saved artifact, laid beside the base's own and put in their places on demand.

Layers of an artifact that is off hang nowhere in the base: it runs its own modules, bit for bit.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from luthier.core.errors import ArtifactCorruptError
from luthier.methods._peft import CONFIG_NAME, WEIGHTS_NAME
from luthier.methods.base import Attached, Installed

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig
    from transformers import PreTrainedModel

_ADAPTER = "default"
# What PEFT's wrapper adds to every name.
_PREFIX = "base_model.model."
_Places = list[tuple["torch.nn.Module", str, "torch.nn.Module"]]


class InstalledLora(Installed):
    """LoRA layers that take the places of a base's linear layers while they are on.

    Args:
        layers: the parent module, the name in it, and PEFT's layer, which holds the base's own.
    """

    def __init__(self, layers: _Places) -> None:
        self._layers = layers

    def switch_on(self) -> None:
        """Put PEFT's layers in their places."""
        for parent, name, layer in self._layers:
            setattr(parent, name, layer)

    def switch_off(self) -> None:
        """Put the base's own layers back."""
        for parent, name, layer in self._layers:
            setattr(parent, name, layer.base_layer)

    def remove(self) -> None:
        """Put the base's own layers back and forget the others."""
        self.switch_off()
        self._layers = []


def install_lora(causal_lm: "PreTrainedModel", folder: Path) -> InstalledLora:
    """Build an artifact's layers on a base that bears none, and leave them off.

    Raises:
        ArtifactCorruptError: when the files can't be read or don't fit the base.
    """
    from peft import inject_adapter_in_model
    from safetensors import SafetensorError
    from safetensors.torch import load_file

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
    from safetensors import SafetensorError
    from safetensors.torch import load_file

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


def _fill(causal_lm: "PreTrainedModel", weights: "dict[str, torch.Tensor]") -> None:
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
