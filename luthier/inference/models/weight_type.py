"""The type of served weights: bfloat16 where the device multiplies it in hardware, else float32."""

import torch

from luthier.core.devices import cpu_multiplies_bf16
from luthier.core.settings import Settings


def name_of(dtype: torch.dtype) -> str:
    """Return a type's name as settings and answers have it: float32 or bfloat16."""
    return str(dtype).removeprefix("torch.")


def choose_dtype(settings: Settings, device: str) -> torch.dtype:
    """Return the type to serve bases in; devices that emulate bfloat16 are many times slower in it."""
    if settings.inference_dtype != "auto":
        return torch.bfloat16 if settings.inference_dtype == "bfloat16" else torch.float32
    if device == "cpu":
        has_it = cpu_multiplies_bf16()
    else:
        has_it = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_it else torch.float32
