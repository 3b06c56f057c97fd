"""AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) and its rate as a pure function of the step."""

import math

import torch

from luthier.training.model.split_adamw import BETAS, EPSILON, SplitAdamW


def build_optimizer(
    parameters: list[torch.nn.Parameter], *, learning_rate: float, weight_decay: float, device: str
) -> torch.optim.AdamW | SplitAdamW:
    """Build AdamW over the trained parameters with betas 0.9 and 0.999; its state is float32.

    Args:
        parameters: float32 or bf16 parameters, in a stable order.
        learning_rate: the peak rate; every step sets its own.
        device: where the parameters lie.

    Returns:
        The optimizer, fused on a CPU; one that keeps masters where a parameter is bf16.
    """
    if any(parameter.dtype != torch.float32 for parameter in parameters):
        return SplitAdamW(parameters, learning_rate=learning_rate, weight_decay=weight_decay)
    return torch.optim.AdamW(
        parameters,
        lr=learning_rate,
        betas=BETAS,
        eps=EPSILON,
        weight_decay=weight_decay,
        foreach=device.startswith("cuda"),
        fused=not device.startswith("cuda"),
    )


def learning_rate_at(step: int, *, num_steps: int, peak: float, warmup_ratio: float) -> float:
    """Compute the rate of a step: a linear rise, then half a cosine down to a tenth of the peak.

    Args:
        step: 1 for the first step.
        num_steps: steps of the whole run.

    Returns:
        The rate, above 0.
    """
    num_warmup = math.ceil(num_steps * warmup_ratio)
    if step <= num_warmup:
        return peak * step / num_warmup
    progress = (step - num_warmup) / max(1, num_steps - num_warmup)
    return peak * (0.1 + 0.9 * 0.5 * (1.0 + math.cos(math.pi * progress)))
