"""The two files of an adapter in PEFT's layout: weights and configuration, equal bytes for equal settings."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"


def write_adapter(folder: Path, weights: "dict[str, torch.Tensor]", config: dict[str, Any]) -> list[str]:
    """Write an adapter's weights and its configuration, PEFT's `to_dict`; return the files' names."""
    from safetensors.torch import save_file

    tensors = {name: weights[name].detach().cpu().contiguous() for name in sorted(weights)}
    save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    text = json.dumps(_plain(config | {"inference_mode": True}), indent=2, sort_keys=True)
    (folder / CONFIG_NAME).write_text(text + "\n")
    return [WEIGHTS_NAME, CONFIG_NAME]


def peft_type(folder: Path) -> str | None:
    """Return the `peft_type` that a folder's configuration names; None where there is no such file."""
    try:
        config = json.loads((folder / CONFIG_NAME).read_bytes())
    except (OSError, ValueError):
        return None
    found = config.get("peft_type") if isinstance(config, dict) else None
    return found if isinstance(found, str) else None


def _plain(value: Any) -> Any:
    """Return sets as sorted lists and leave unset members out, so that equal settings give equal bytes."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value
