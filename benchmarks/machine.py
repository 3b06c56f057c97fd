"""What this machine can do at best: the denominators of every share."""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama-like model; `query` and `key_value` are heads times head size."""

    layers: int
    hidden: int
    intermediate: int
    query: int
    key_value: int
    vocabulary: int

    @property
    def linear_layers(self) -> list[tuple[int, int]]:
        """Inputs and outputs of every linear layer of one block."""
        return [
            (self.hidden, self.query),
            (self.hidden, self.key_value),
            (self.hidden, self.key_value),
            (self.query, self.hidden),
            (self.hidden, self.intermediate),
            (self.hidden, self.intermediate),
            (self.intermediate, self.hidden),
        ]

    @property
    def body_weights(self) -> int:
        """Weights of all linear layers, the output layer not among them."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.linear_layers)


def step_flops(
    shape: Shape, tuning: dict[str, Any], *, num_tokens: int, num_supervised: int, num_rows: int
) -> float:
    """Return the operations of one pass over some rows, each computed whole, forward and backward.

    A weight costs 2 operations a token forward, 2 for the gradient of its input, 2 for its own (Kaplan et
    al. 2020, arXiv 2001.08361, section 2.1); a frozen weight has no gradient of its own, so it costs 4 (Hu et
    al. 2021, arXiv 2106.09685, section 4.2). Attention's scores, norms and activations are left out. Tokens
    that rows share are counted in every row, as peers compute them.

    Args:
        shape: the model.
        tuning: the method and its resolved parameters.
        num_tokens: real tokens of the rows.
        num_supervised: tokens that are predicted; only these need the output layer.
        num_rows: the rows.

    Returns:
        `4 N T + 4 V d S` for a frozen base of N weights in its body, T tokens and S supervised ones, plus 6
        for every trained weight and token; virtual tokens of prompt tuning run through the body too.
    """
    kind = tuning["type"]
    head = shape.vocabulary * shape.hidden * num_supervised
    if kind == "full":
        return 6.0 * (shape.body_weights * num_tokens + head)
    frozen = 4.0 * (shape.body_weights * num_tokens + head)
    if kind == "lora":
        pairs = shape.layers * sum(inputs + outputs for inputs, outputs in shape.linear_layers)
        return frozen + 6.0 * tuning["rank"] * pairs * num_tokens
    if kind == "adapter":
        per_block = 2 if tuning["placement"] == "houlsby" else 1
        width = tuning["bottleneck_dim"]
        return frozen + 6.0 * shape.layers * per_block * 2 * shape.hidden * width * num_tokens
    if kind == "prompt":
        return frozen + 4.0 * shape.body_weights * tuning["num_virtual_tokens"] * num_rows
    return frozen


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
