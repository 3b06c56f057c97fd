"""The device that this machine trains and serves on: its name, and the memory that the service may use of it.

Needs no torch: the driver reports a GPU's memory. What jobs hold of it is in services/capacity/memory.py.
"""

import ctypes
import os
import socket
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from luthier.core.settings import Settings

# A container's memory limit, in control groups v2 and v1.
_CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
_DEFAULT_RESERVED_SHARE = 10
# NVML_DEVICE_UUID_V2_BUFFER_SIZE
_UUID_BYTES = 96
# Exists where a GPU driver is loaded.
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Device:
    """A device's memory, split between training and serving.

    `name` is `cpu`, or a GPU's UUID: its number says which it is in one container alone.
    """

    hostname: str
    name: str
    training_bytes: int
    serving_bytes: int

    @property
    def total_bytes(self) -> int:
        """Memory that the service may use."""
        return self.training_bytes + self.serving_bytes

    def __str__(self) -> str:
        return f"{self.hostname} {self.name}"


def find_device(settings: Settings) -> Device | None:
    """Return the device of training and serving; None where it is a GPU whose driver reports no memory."""
    gpu = None if settings.device == "cpu" else _find_gpu()
    if gpu is None and settings.device == "cuda":
        if not settings.device_memory_bytes:
            return None
        gpu = ("cuda", settings.device_memory_bytes)
    name, total = gpu or ("cpu", _main_memory_bytes())
    reserved = settings.memory_reserve_bytes or total // _DEFAULT_RESERVED_SHARE
    total = settings.device_memory_bytes or max(0, total - reserved)
    serving_bytes = int(settings.serving_memory_share * total)
    return Device(socket.gethostname(), name, total - serving_bytes, serving_bytes)


def format_bytes(num_bytes: int) -> str:
    """Return bytes as users read them."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 100_000_000 else f"{num_bytes / 1e6:.1f} MB"


def container_limits() -> list[int]:
    """Return the limits of memory that this process's container sets, in bytes; none outside of one."""
    found: list[int] = []
    for path in _CGROUP_LIMITS:
        with suppress(OSError):
            text = path.read_text().strip()
            found += [int(text)] if text.isdigit() else []
    return found


def _main_memory_bytes() -> int:
    """Return the machine's memory, or a container's limit where that is lower."""
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *container_limits()])


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


def _find_gpu() -> tuple[str, int] | None:
    """Return UUID and bytes of the first NVIDIA GPU that a process of ours would use, None without one.

    By NVML, https://docs.nvidia.com/deploy/nvml-api/: the functions' names, and 0 for success.
    """
    asked = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    if not asked or library.nvmlInit_v2() != 0:
        return None
    try:
        gpu, uuid, memory = ctypes.c_void_p(), ctypes.create_string_buffer(_UUID_BYTES), _Memory()
        if asked.isdigit():
            found = library.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(int(asked)), ctypes.byref(gpu))
        else:
            found = library.nvmlDeviceGetHandleByUUID(asked.encode(), ctypes.byref(gpu))
        if found or library.nvmlDeviceGetUUID(gpu, uuid, ctypes.c_uint(_UUID_BYTES)):
            return None
        if library.nvmlDeviceGetMemoryInfo(gpu, ctypes.byref(memory)):
            return None
        return uuid.value.decode(), int(memory.total)
    finally:
        library.nvmlShutdown()


# CPUs that multiply bf16 in hardware: elsewhere bf16 is emulated and slower than float32.
_BF16_CPU_FLAGS = {"avx512_bf16", "amx_bf16"}


def cpu_multiplies_bf16() -> bool:
    """Whether this machine's CPU multiplies bf16 in hardware; others emulate it, slower than float32."""
    if sys.platform != "linux":
        return False
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return not _BF16_CPU_FLAGS.isdisjoint(line.split())
    return False
