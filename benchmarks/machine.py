"""What this machine can do at best: the denominators of every share."""

import json
import os
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.roofline import Shape

# Long enough to pass over a moment in which the other core was busy, short enough to stand before each pair.
_SECONDS_A_PRODUCT = 0.4


def gemm_gflops(dtype: torch.dtype, *, rows: int, inner: int, columns: int, device: str = "cpu") -> float:
    """Return the best of many matrix products in GFLOP/s.

    Args:
        dtype: of both factors.
        rows: rows of the left factor.
        inner: the shared dimension.
        columns: columns of the right factor.
        device: cpu or cuda.
    """
    left = torch.randn(rows, inner, dtype=dtype, device=device)
    right = torch.randn(inner, columns, dtype=dtype, device=device)
    best, end = 0.0, time.perf_counter() + _SECONDS_A_PRODUCT
    while time.perf_counter() < end:
        begin = time.perf_counter()
        torch.mm(left, right)
        if device == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * rows * inner * columns / (time.perf_counter() - begin) / 1e9)
    return best


def gemm_peaks(shape: Shape, num_tokens: int, num_threads: int, device: str = "cpu") -> dict[str, float]:
    """Measure the peak of matrix products in GFLOP/s: the best over the model's own shapes and a square.

    Args:
        shape: the model.
        num_tokens: tokens of one step, with padding.
        num_threads: threads, as in training.
        device: cpu or cuda.

    Returns:
        `bfloat16` and `float32`.
    """
    torch.set_num_threads(num_threads)
    products = [
        (num_tokens, shape.hidden, shape.intermediate),
        (num_tokens, shape.intermediate, shape.hidden),
        (num_tokens, shape.hidden, shape.hidden),
        (2048, 2048, 2048),
    ]
    return {
        name: max(
            gemm_gflops(dtype, rows=rows, inner=inner, columns=columns, device=device)
            for rows, inner, columns in products
        )
        for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32))
    }


class StolenTime:
    """The share of this machine's time that the host gave to others since `begin` (proc(5), /proc/stat)."""

    def __init__(self) -> None:
        self._stolen, self._all = _ticks()

    def share(self) -> float:
        """Return the share since the start, 0 to 1."""
        stolen, everything = _ticks()
        return (stolen - self._stolen) / max(1, everything - self._all)


def describe_machine() -> dict[str, Any]:
    """Return the processor, its cores, the memory and torch's version."""
    memory = Path("/proc/meminfo").read_text().split()
    return {
        "processor": _name_processor(Path("/proc/cpuinfo").read_text()),
        "num_cores": os.cpu_count(),
        "memory_gib": round(int(memory[1]) / 1024**2, 1),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
    }


def _name_processor(info: str) -> str:
    """Return the processor's name and, as a virtual machine's may be that of many, its family and model."""
    facts = dict(line.split(":", 1) for line in info.splitlines() if ":" in line)
    found = {name.strip(): value.strip() for name, value in facts.items()}
    name = found.get("model name", "?")
    if "cpu family" in found and "model" in found:
        name += f" (family {found['cpu family']}, model {found['model']})"
    return name


def read_shape(base: Path) -> Shape:
    """Read the shape of a Llama-like base from its config.json."""
    config = json.loads((base / "config.json").read_bytes())
    heads = config["num_attention_heads"]
    head_size = config.get("head_dim") or config["hidden_size"] // heads
    return Shape(
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        intermediate=config["intermediate_size"],
        query=heads * head_size,
        key_value=config.get("num_key_value_heads", heads) * head_size,
        vocabulary=config["vocab_size"],
    )


def _ticks() -> tuple[int, int]:
    ticks = [int(value) for value in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    return ticks[7], sum(ticks[:8])
