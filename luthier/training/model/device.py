"""What the machine is: device, types of the weights, threads, memory."""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from luthier.core.errors import InvalidRequestError, UnsuitableMachineError
from luthier.core.specs import Precision

# CPUs that multiply bf16 in hardware: elsewhere bf16 is emulated and slower than float32.
_BF16_CPU_FLAGS = {"avx512_bf16", "amx_bf16"}


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
                "The job was begun in bfloat16, which this worker's hardware does not multiply. It goes on "
                "where the hardware does. For jobs that go on anywhere, set training.precision to float32."
            )
        dtype = torch.bfloat16 if gains and begun_in != "float32" else torch.float32
    return Machine(device="cuda" if on_cuda else "cpu", dtype=dtype)


def peak_memory_bytes(device: str) -> int:
    """Return the most memory in use so far: the device's on CUDA, this process's resident set on a CPU."""
    if device.startswith("cuda"):
        return int(torch.cuda.max_memory_allocated())
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def gpu_multiplies_bf16() -> bool:
    """Whether the CUDA device multiplies bf16 in hardware; older ones emulate it, many times slower."""
    return torch.cuda.is_bf16_supported(including_emulation=False)


def cpu_multiplies_bf16() -> bool:
    if sys.platform != "linux":
        return False
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return not _BF16_CPU_FLAGS.isdisjoint(line.split())
    return False
