"""What PEFT holds: methods whose parameters it has, and the two files of an adapter in its layout."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from luthier.core.errors import ArtifactCorruptError
from luthier.methods.base import Attached, Method

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig
    from transformers import PreTrainedModel

WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"


def write_adapter(folder: Path, weights: "dict[str, torch.Tensor]", config: dict[str, Any]) -> list[str]:
    """Write an adapter's weights and its configuration, PEFT's `to_dict`; return the files' names.

    Equal weights and settings give equal bytes.
    """
    from safetensors.torch import save_file

    tensors = {name: weights[name].detach().cpu().contiguous() for name in sorted(weights)}
    save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    text = json.dumps(_plain(config | {"inference_mode": True}), indent=2, sort_keys=True)
    (folder / CONFIG_NAME).write_text(text + "\n")
    return [WEIGHTS_NAME, CONFIG_NAME]


def find_config(folder: Path) -> dict[str, Any]:
    """Return the configuration in an adapter's folder; an empty one where there is none that can be read."""
    try:
        config = json.loads((folder / CONFIG_NAME).read_bytes())
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


class PeftMethod(Method):
    """A method whose parameters PEFT holds, under its name `peft_type`: what is saved loads in PEFT."""

    peft_type: ClassVar[str]

    def recognises(self, folder: Path) -> bool:
        return find_config(folder).get("peft_type") == self.peft_type

    def load(self, causal_lm: "PreTrainedModel", folder: Path) -> Attached:
        from peft import PeftConfig, PeftModel, get_peft_model_state_dict
        from safetensors import safe_open

        config = PeftConfig.from_pretrained(str(folder))
        if hasattr(config, "init_lora_weights"):
            # The weights come from the file, and some initialisations would change the base's.
            config.init_lora_weights = False
        model = PeftModel.from_pretrained(causal_lm, str(folder), config=config, local_files_only=True)
        held = get_peft_model_state_dict(model, save_embedding_layers=False)
        with safe_open(folder / WEIGHTS_NAME, framework="pt") as stored:
            # PEFT leaves what is missing at its initial values.
            if set(stored.keys()) != held.keys():
                raise ArtifactCorruptError("The artifact's weights do not match the modules of its base.")
        return Attached(model=model.requires_grad_(False).eval(), causal_lm=causal_lm)


def attach_peft(causal_lm: "PreTrainedModel", config: "PeftConfig") -> Attached:
    """Let PEFT put an adapter on a base."""
    from peft import get_peft_model

    # PEFT records the model's own name as the base; an artifact names its base by id, never by a path.
    causal_lm.name_or_path = config.base_model_name_or_path
    return Attached(model=get_peft_model(causal_lm, config), causal_lm=causal_lm)


def _plain(value: Any) -> Any:
    """Return sets as sorted lists and leave unset members out, so that equal settings give equal bytes."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value
