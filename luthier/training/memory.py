"""Memory: how much a run needs, how much there is, and how to tell that it has run out."""

import resource
from pathlib import Path

import torch

from luthier.core.errors import OutOfMemoryError
from luthier.core.specs import BaseFacts
from luthier.training.device import Machine

# What one token of one layer takes per hidden number, in bytes, in bf16 and without checkpointing.
_BYTES_PER_TOKEN_LAYER_HIDDEN = 60
# A trained number in float32, its gradient, and AdamW's two averages.
_BYTES_PER_TRAINED = 16
# Where a container's limit stands, in the second and the first version of control groups.
_CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out; the CPU's allocator only says so in its text."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return "DefaultCPUAllocator: can't allocate memory" in str(error)


def needed_bytes(base: BaseFacts, machine: Machine, *, num_trained: int, num_tokens: int) -> int:
    """Estimate what a step takes: weights, what is trained with its optimizer, and activations.

    Args:
        num_tokens: padded tokens that are in memory at once.
    """
    size = machine.dtype.itemsize
    weights = base.num_parameters * size
    # The measured bytes are for two-byte numbers.
    activations = num_tokens * base.num_layers * base.hidden_size * _BYTES_PER_TOKEN_LAYER_HIDDEN * size // 2
    return weights + num_trained * _BYTES_PER_TRAINED + activations


def there_is_bytes(machine: Machine) -> int:
    """Return the memory that this process could have: the device's, or what system and limits leave."""
    if machine.device == "cuda":
        return int(torch.cuda.mem_get_info()[1])
    limits = [_bytes_in("/proc/meminfo", "MemAvailable") + _bytes_in("/proc/self/status", "VmRSS")]
    for path in _CGROUP_LIMITS:
        if path.is_file() and (limit := path.read_text().strip()).isdigit():
            limits.append(int(limit))
    for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA):
        soft, _ = resource.getrlimit(kind)
        if soft != resource.RLIM_INFINITY:
            limits.append(soft)
    return min(limits)


def out_of_memory(
    base: BaseFacts, machine: Machine, *, num_trained: int, num_tokens: int, what: str
) -> OutOfMemoryError:
    """Build the error that names the estimated need beside what there was.

    Args:
        machine: where it ran.
        num_tokens: padded tokens that were in memory at once.
        what: what did not fit, the start of a sentence.
    """
    need = needed_bytes(base, machine, num_trained=num_trained, num_tokens=num_tokens)
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
