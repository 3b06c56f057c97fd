"""Memory: how much there is, how to recognise that it has run out, and the error that says so."""

import resource
from pathlib import Path

import torch

from luthier.core.cost_model import peak_bytes
from luthier.core.devices import container_limits
from luthier.core.errors import OutOfMemoryError
from luthier.core.shapes import read_shape
from luthier.methods import parse_tuning
from luthier.training.model.device import Machine
from luthier.training.output.artifact import Origin


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out; the CPU's allocator only says so in its text."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return "DefaultCPUAllocator: can't allocate memory" in str(error)


def there_is_bytes(machine: Machine) -> int:
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

    Args:
        machine: where it ran.
        num_rows: rows that were in memory at once.
        longest: tokens of the longest of them.
        what: what did not fit, the start of a sentence.
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
        f"{machine.device} has {_mebibytes(there_is_bytes(machine))} for it. Use a smaller "
        "training.max_length, a smaller base, or a method with fewer parameters."
    )


def _mebibytes(num_bytes: int) -> str:
    return f"{num_bytes / 1024**2:,.0f} MiB"


def _bytes_in(path: str, key: str) -> int:
    for line in Path(path).read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return 0
