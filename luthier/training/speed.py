"""`python -P -m luthier.training --measure-speed DEVICE NUM_THREADS`: the speed of matrix products."""

import time

import torch

from luthier.core.cost_model import NUMBER_BYTES, DeviceSpeed
from luthier.training.model.device import choose_machine

# A micro-batch of rows and a linear layer of a small base, which a processor's caches do not hold.
_TOKENS, _INPUTS, _OUTPUTS = 512, 1024, 2048
_SECONDS = 0.5


def measure_speed(device: str, num_threads: int) -> DeviceSpeed:
    """Measure the product of two matrices in each type for half a second; the fastest one counts.

    Args:
        device: `auto`, `cpu` or `cuda`.
    """
    machine = choose_machine(device, "auto", num_threads)
    return DeviceSpeed(
        device=machine.device,
        num_threads=num_threads,
        precision=machine.precision,
        product_flops={name: _measure(machine.device, getattr(torch, name)) for name in NUMBER_BYTES},
    )


def _measure(device: str, dtype: torch.dtype) -> float:
    inputs = torch.ones(_TOKENS, _INPUTS, dtype=dtype, device=device)
    weight = torch.ones(_OUTPUTS, _INPUTS, dtype=dtype, device=device)
    best = float("inf")
    until = time.perf_counter() + _SECONDS
    while time.perf_counter() < until:
        began = time.perf_counter()
        torch.nn.functional.linear(inputs, weight)
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * _TOKENS * _INPUTS * _OUTPUTS / best
