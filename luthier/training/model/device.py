"""The training device: its type of weights, threads, memory and speed."""

import resource
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from luthier.core.cost_model import NUMBER_BYTES, DeviceSpeed, peak_bytes
from luthier.core.devices import container_limits, cpu_multiplies_bf16
from luthier.core.errors import InvalidRequestError, OutOfMemoryError, UnsuitableMachineError
from luthier.core.shapes import read_shape
from luthier.core.specs import Precision
from luthier.methods._tuning import parse_tuning
from luthier.training.output.artifact import Origin


@dataclass(frozen=True)
class Machine:
    """Where a run computes: `device` is cpu or cuda, `dtype` the type of the frozen weights at rest."""

    device: str
    dtype: torch.dtype

    @property
    def precision(self) -> str:
        """The type's name on the wire: float32 or bfloat16."""
        return str(self.dtype).removeprefix("torch.")


def choose_machine(
    device: str, precision: Precision, num_threads: int, *, begun_in: str | None = None
) -> Machine:
    """Settle device, precision and threads; on a CPU every operation is repeatable.

    Args:
        device: `auto`, `cpu` or `cuda`.
        precision: `auto` takes bfloat16 where the hardware multiplies it.
        num_threads: CPU threads; they decide the order of sums.
        begun_in: the type that an earlier attempt took; `auto` follows it.

    Raises:
        InvalidRequestError: when CUDA is asked for and there is none.
        UnsuitableMachineError: when `auto` must follow a type that this machine would have to emulate.
    """
    torch.set_num_threads(num_threads)
    if device == "cuda" and not torch.cuda.is_available():
        raise InvalidRequestError("This machine has no CUDA device. Set LUTHIER_DEVICE to cpu or auto.")
    on_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if not on_cuda:
        # Equal bytes after a resume are promised on a CPU; on CUDA the repeatable kernels cost too much.
        torch.use_deterministic_algorithms(True)
        # Filling every new tensor is a debugging aid with a price, and nothing here reads unwritten memory.
        torch.utils.deterministic.fill_uninitialized_memory = False
    if precision == "float32":
        dtype = torch.float32
    elif precision == "bfloat16":
        dtype = torch.bfloat16
    else:
        gains = gpu_multiplies_bf16() if on_cuda else cpu_multiplies_bf16()
        if begun_in == "bfloat16" and not gains:
            raise UnsuitableMachineError(
                "The job was begun in bfloat16, which this worker's hardware does not multiply. It "
                "continues on one that does. For jobs that any worker can continue, set training.precision "
                "to float32."
            )
        dtype = torch.bfloat16 if gains and begun_in != "float32" else torch.float32
    return Machine(device="cuda" if on_cuda else "cpu", dtype=dtype)


def peak_memory_bytes(device: str) -> int:
    """Return the most memory in use so far: the device's on CUDA, this process's resident set on a CPU."""
    if device.startswith("cuda"):
        return int(torch.cuda.max_memory_allocated())
    return _bytes_in("/proc/self/status", "VmHWM")


def random_states(device: str) -> dict[str, torch.Tensor]:
    """Return the states of torch's generators: the CPU's, and that of a CUDA device."""
    states = {"torch": torch.get_rng_state()}
    return states | {"cuda": torch.cuda.get_rng_state()} if device.startswith("cuda") else states


def restore_random_states(states: dict[str, torch.Tensor], device: str) -> None:
    """Put back what `random_states` returned, maybe on a machine of another kind."""
    torch.set_rng_state(states["torch"])
    if device.startswith("cuda") and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


def gpu_multiplies_bf16() -> bool:
    """Whether the CUDA device multiplies bf16 in hardware; older ones emulate it, many times slower."""
    return torch.cuda.is_bf16_supported(including_emulation=False)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out; the CPU's allocator only says so in its text."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return "DefaultCPUAllocator: can't allocate memory" in str(error)


def available_bytes(machine: Machine) -> int:
    """Return the memory that this process could have: the device's, or what system and limits leave."""
    if machine.device == "cuda":
        return int(torch.cuda.mem_get_info()[1])
    available = _bytes_in("/proc/meminfo", "MemAvailable") + _bytes_in("/proc/self/status", "VmRSS")
    limits = [available, *container_limits()]
    for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA):
        soft, _ = resource.getrlimit(kind)
        if soft != resource.RLIM_INFINITY:
            limits.append(soft)
    return min(limits)


def out_of_memory(
    origin: Origin, machine: Machine, *, num_rows: int, longest: int, what: str
) -> OutOfMemoryError:
    """Build the error that names the need, by the formula of estimates and admission, beside what there was.

    `num_rows` were in memory at once, `longest` has the longest of them in tokens; `what`, which did not fit,
    begins the sentence.
    """
    method, params = parse_tuning(origin.spec.tuning)
    shape = read_shape(Path(origin.inputs.base_path))
    cost = method.cost(params, shape)
    need = peak_bytes(
        cost,
        shape,
        device=machine.device,
        precision=machine.precision,
        is_whole_model=method.is_whole_model,
        num_tokens=num_rows * (longest + cost.num_virtual_tokens),
        longest=longest,
    )
    return OutOfMemoryError(
        f"{what} does not fit into memory: about {_mebibytes(need)} are needed and this worker's "
        f"{machine.device} has {_mebibytes(available_bytes(machine))} for it. Use a smaller "
        "training.max_length, a smaller base, or a method with fewer parameters."
    )


def _mebibytes(num_bytes: int) -> str:
    return f"{num_bytes / 1024**2:,.0f} MiB"


def _bytes_in(path: str, key: str) -> int:
    for line in Path(path).read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return 0


# A micro-batch of rows and a linear layer of a small base, which a processor's caches do not hold.
_TOKENS, _INPUTS, _OUTPUTS = 512, 1024, 2048
_SECONDS = 0.5


def measure_speed(device: str, num_threads: int) -> DeviceSpeed:
    """Measure the product of two matrices in each type for half a second; the fastest one counts."""
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
