"""Loading a base from its folder: safetensors only, no remote code, no network."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from luthier.core.errors import BaseUnavailableError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_base(
    folder: Path, *, dtype: torch.dtype, device: str, refuse_extra: bool = False
) -> "PreTrainedModel":
    """Load a causal language model with every weight frozen.

    Args:
        folder: a fetched base, with config.json and safetensors weights.
        dtype: type of the weights at rest.
        device: `cpu`, `cuda` or `cuda:N`.
        refuse_extra: also refuse tensors that the architecture has no place for.

    Returns:
        The model in evaluation mode.

    Raises:
        BaseUnavailableError: when the folder can't be read as a model, or lacks some of its tensors.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation="sdpa",
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise BaseUnavailableError(
            f"The base in {folder.name!r} can't be loaded: {type(error).__name__}. Fetch it again."
        ) from error
    # What is missing was filled with random numbers.
    if found["missing_keys"] or (refuse_extra and found["unexpected_keys"]):
        raise BaseUnavailableError(
            f"The base in {folder.name!r} can't be loaded: its weights are not those of its architecture. "
            "Fetch it again."
        )
    return model.to(device).requires_grad_(False).eval()
