"""What decoding could reach at most: bytes over the measured bandwidth, products over the measured peak."""

import time
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import torch

from benchmarks.machine import Shape, gemm_peaks

_NUM_BYTES = 512 * 1024 * 1024
_SECONDS_A_MEASURE = 0.5
_BF16_BYTES = 2


@dataclass(frozen=True)
class Limits:
    """Rates of this machine at this moment; copies count what is read and what is written.

    A step reads its weights and writes next to nothing. What a copy moves both ways together may be more
    than can be read, as processors read and write at the same time.
    """

    copy_gigabytes_per_second: float
    read_gigabytes_per_second: float
    gemm_bf16_gflops: float

    @property
    def bytes_per_second(self) -> float:
        """The best rate at which memory was read, be it for a copy."""
        return max(self.copy_gigabytes_per_second / 2, self.read_gigabytes_per_second) * 1e9


@dataclass(frozen=True)
class Work:
    """Streams that run together: each continues a prompt by some tokens.

    `adapter_weights` are the numbers of all distinct artifacts of linear layers, `row_weights`
    those that the tokens of all streams meet: one stream's artifact for each.
    """

    shape: Shape
    num_streams: int
    num_prompt: int
    num_new: int
    adapter_weights: int
    row_weights: int

    @property
    def base_weights(self) -> int:
        """Numbers that every step reads: the body and the output layer."""
        return self.shape.body_weights + self.shape.vocabulary * self.shape.hidden

    @property
    def step_bytes(self) -> float:
        """Bytes that a step of one token a stream reads at half way: weights, keys and values.

        All as bf16.
        """
        length = self.num_prompt + self.num_new / 2
        cached = 2 * self.shape.layers * self.shape.key_value * length * self.num_streams
        return _BF16_BYTES * (self.adapter_weights + cached + self.base_weights)

    @property
    def step_flops(self) -> float:
        """Operations of the products of such a step, two a weight and token; attention's are left out."""
        return 2.0 * (self.base_weights * self.num_streams + self.row_weights)

    @property
    def prompt_flops(self) -> float:
        """Operations of the products over all prompts; the output layer is needed at their ends alone."""
        body = self.shape.body_weights * self.num_streams + self.row_weights
        return 2.0 * body * self.num_prompt


def best_tokens_per_second(work: Work, limits: Limits) -> dict[str, float]:
    """Return what the machine allows.

    Args:
        work: the streams.
        limits: measured rates.

    Returns:
        Tokens a second by `bytes` and by `products` of the steps alone, the smaller of them as `steps`, and
        `run`: that with the products over the prompts before them.
    """
    by_bytes = work.num_streams * limits.bytes_per_second / work.step_bytes
    peak = limits.gemm_bf16_gflops * 1e9
    by_products = work.num_streams * peak / work.step_flops
    steps = min(by_bytes, by_products)
    tokens = work.num_streams * work.num_new
    return {
        "bytes": by_bytes,
        "products": by_products,
        "steps": steps,
        "run": tokens / (tokens / steps + work.prompt_flops / peak),
    }


def measure_limits(shape: Shape, num_streams: int, num_threads: int) -> Limits:
    """Measure the machine, about five seconds long, with no other program at work.

    Args:
        shape: of the base.
        num_streams: rows of a step.
        num_threads: as many as the sides have.

    Returns:
        The rates.
    """
    torch.set_num_threads(num_threads)
    source, target = torch.ones(_NUM_BYTES // 4), torch.empty(_NUM_BYTES // 4)
    copied = _best_rate(lambda: target.copy_(source), 2 * _NUM_BYTES)
    matrix, vector, numbers = source.view(-1, 4096), torch.ones(4096), source.numpy()
    numba.set_num_threads(min(num_threads, numba.get_num_threads()))
    _add_up(numbers[:64])
    ways = (lambda: torch.mv(matrix, vector), source.sum, lambda: _add_up(numbers))
    read = max(_best_rate(way, _NUM_BYTES) for way in ways)
    peaks = gemm_peaks(shape, max(16, num_streams), num_threads)
    return Limits(copied, read, peaks["bfloat16"])


@numba.njit(parallel=True, fastmath=True)  # type: ignore[untyped-decorator]
def _add_up(numbers: "np.ndarray[Any, np.dtype[np.float32]]") -> float:
    """Return a sum, which asks little of a processor but to read."""
    total = np.float32(0.0)
    for place in numba.prange(len(numbers)):
        total += numbers[place]
    return float(total)


def _best_rate(work: object, num_bytes: int) -> float:
    assert callable(work)
    best, end = 0.0, time.perf_counter() + _SECONDS_A_MEASURE
    while time.perf_counter() < end:
        begin = time.perf_counter()
        work()
        best = max(best, num_bytes / (time.perf_counter() - begin) / 1e9)
    return best
