"""AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101), for bf16 parameters with float32 master weights."""

import math
from pathlib import Path
from typing import Any

import torch
from torch.optim.adamw import adamw

from luthier.methods import Attached
from luthier.modeling.load import iterate_weights

BETAS = (0.9, 0.999)
EPSILON = 1e-8

# Numbers updated at a time: on a CPU few enough that all passes over them stay in its cache.
_BLOCK_NUMBERS = {"cpu": 512 * 1024, "cuda": 16 * 1024 * 1024}


class SplitAdamW(torch.optim.Optimizer):
    """AdamW whose bf16 parameters are the upper halves of float32 numbers.

    An update is often smaller than a bf16 rounding and would be lost. So every bf16 parameter has a float32
    master. Its upper 16 bits, rounded, are the parameter itself; only the rest is kept here, as an int16:
    the master's bits are the parameter's, shifted by 16, plus the rest. That is exact, and parameter and
    master together take 4 bytes a number instead of 6. Blocks are put together, updated in float32 and split
    again. Float32 parameters are updated as they are. A master begins as its parameter, or as what
    `set_master` says. A parameter of another type raises ValueError.
    """

    def __init__(
        self, parameters: list[torch.nn.Parameter], *, learning_rate: float, weight_decay: float
    ) -> None:
        if not all(parameter.dtype in {torch.bfloat16, torch.float32} for parameter in parameters):
            raise ValueError("Only bf16 and float32 parameters can be updated.")
        super().__init__(parameters, {"lr": learning_rate, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, *, gradient_scale: float = 1.0) -> None:
        """Update every parameter that has a gradient, times the scale, and drop the gradient at once."""
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            scratch = _Scratch(parameters)
            for parameter in parameters:
                state = self.state[parameter]
                if not state:
                    state.update(_first_state(parameter))
                state["step"] += 1
                _update(parameter, state, group, gradient_scale, scratch)
                parameter.grad = None

    @torch.no_grad()
    def set_master(self, parameter: torch.nn.Parameter, numbers: torch.Tensor) -> bool:
        """Let a bf16 parameter's master begin as the float32 numbers that the parameter is rounded from.

        Without it the master begins as the parameter, and no update is seen until it reaches half a rounding
        step, in all numbers alike. With it the first ones cross a border in some: as in training in float32
        whose weights are rounded at every use. Call it before the first step.

        Returns:
            False when the parameter is not what these numbers round to, and nothing was set.
        """
        if parameter.dtype != torch.bfloat16 or numbers.shape != parameter.shape:
            return False
        numbers = numbers.to(parameter.device, torch.float32)
        if not torch.equal(numbers.to(torch.bfloat16), parameter):
            return False
        state = self.state[parameter]
        if not state:
            state.update(_first_state(parameter))
        bits = numbers.contiguous().view(torch.int32)
        high = parameter.view(torch.int16).to(torch.int32).bitwise_left_shift_(16)
        # A tie that was rounded down would leave 2^15, one more than there is room for.
        state["low"].copy_((bits - high).clamp_(max=2**15 - 1))
        return True

    @torch.no_grad()
    def master(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        """Return a parameter's float32 numbers, in a new tensor."""
        low = self.state[parameter].get("low")
        if low is None:
            return parameter.float()
        bits = torch.empty(parameter.shape, dtype=torch.int32, device=parameter.device)
        return _join(parameter, low, bits).view(torch.float32)


class _Scratch:
    """Room for one block: allocated once a step, for new memory costs more than the work on it."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        device = parameters[0].device
        self.max_numbers = _BLOCK_NUMBERS[device.type]
        size = max(self.max_numbers, *(one.numel() // max(1, _num_rows(one)) for one in parameters))
        self._bits = torch.empty(size, dtype=torch.int32, device=device)
        self._rounded = torch.empty_like(self._bits)
        self._gradient = torch.empty(size, device=device)

    def block(self, shape: torch.Size) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return int32 bits, int32 room for rounding, and a float32 gradient, of a block's shape."""
        size = shape.numel()
        bits, rounded, gradient = (
            one[:size].view(shape) for one in (self._bits, self._rounded, self._gradient)
        )
        return bits, rounded, gradient


def _num_rows(tensor: torch.Tensor) -> int:
    return tensor.shape[0] if tensor.ndim else 1


def _update(
    parameter: torch.nn.Parameter,
    state: dict[str, torch.Tensor],
    group: dict[str, Any],
    scale: float,
    scratch: _Scratch,
) -> None:
    """Do one parameter's step, block by block along its first axis."""
    tensors = [parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"]]
    if "low" in state:
        tensors.append(state["low"])
    if parameter.ndim == 0:
        tensors = [one[None] for one in tensors]
    num_rows = _num_rows(parameter)
    block = max(1, scratch.max_numbers * num_rows // max(1, parameter.numel()))
    # The function counts the step itself, once for every block.
    num_done = float(state["step"]) - 1
    for start in range(0, num_rows, block):
        numbers, raw, mean, square, *low = (one[start : start + block] for one in tensors)
        bits, rounded, gradient = scratch.block(numbers.shape)
        master = bits.view(torch.float32)
        if low:
            _join(numbers, low[0], bits)
        else:
            master.copy_(numbers)
        adamw(
            [master],
            [gradient.copy_(raw).mul_(scale)],
            [mean],
            [square],
            [],
            [torch.full((), num_done, device=parameter.device)],
            fused=True,
            amsgrad=False,
            beta1=BETAS[0],
            beta2=BETAS[1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=EPSILON,
            maximize=False,
        )
        if low:
            _split(bits, numbers, low[0], rounded)
        else:
            numbers.copy_(master)


def _first_state(parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
    shape, device = parameter.shape, parameter.device
    state = {
        "step": torch.zeros(()),
        "exp_avg": torch.zeros(shape, dtype=torch.float32, device=device),
        "exp_avg_sq": torch.zeros(shape, dtype=torch.float32, device=device),
    }
    if parameter.dtype == torch.bfloat16:
        state["low"] = torch.zeros(shape, dtype=torch.int16, device=device)
    return state


def _join(high: torch.Tensor, low: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """Write into `bits`, int32, those of the float32 numbers whose halves are bf16 and int16 numbers."""
    return bits.copy_(high.view(torch.int16)).bitwise_left_shift_(16).add_(low)


def _split(bits: torch.Tensor, high: torch.Tensor, low: torch.Tensor, rounded: torch.Tensor) -> None:
    """Write the halves of float32 numbers: the upper rounded to the nearest, the lower what is left.

    Ties are rounded away from zero, so that what is left is from -2^15 to 2^15 - 1. `bits` is overwritten.
    """
    torch.add(bits, 1 << 15, out=rounded).bitwise_right_shift_(16)
    high.view(torch.int16).copy_(rounded)
    low.copy_(bits.sub_(rounded.bitwise_left_shift_(16)))


def build_optimizer(
    parameters: list[torch.nn.Parameter], *, learning_rate: float, weight_decay: float, device: str
) -> torch.optim.AdamW | SplitAdamW:
    """Build AdamW over the trained parameters with betas 0.9 and 0.999; its state is float32.

    It is fused on a CPU, and keeps masters where a parameter is bf16. Every step sets its own rate.
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
    """Compute the rate, above 0, of a step from 1 on: a linear rise, then half a cosine down to a tenth."""
    num_warmup = math.ceil(num_steps * warmup_ratio)
    if step <= num_warmup:
        return peak * step / num_warmup
    progress = (step - num_warmup) / max(1, num_steps - num_warmup)
    return peak * (0.1 + 0.9 * 0.5 * (1.0 + math.cos(math.pi * progress)))


def start_master_weights(optimizer: torch.optim.Optimizer, attached: Attached, folder: Path) -> int:
    """Let the masters of trained base weights be the base's own numbers; return how many are.

    A file whose numbers are bf16 or of less precision has nothing to give; a weight that the library has
    renamed or put together from several is left as it is, and so is an optimizer without masters.
    """
    if not isinstance(optimizer, SplitAdamW):
        return 0
    trained = {
        name: weight
        for name, weight in attached.causal_lm.named_parameters(remove_duplicate=False)
        if weight.requires_grad and weight.dtype == torch.bfloat16
    }
    if not trained:
        return 0
    return sum(
        optimizer.set_master(trained[name], numbers)
        for name, numbers in iterate_weights(folder)
        if name in trained and numbers.dtype in (torch.float32, torch.float64)
    )
