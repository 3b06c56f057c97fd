"""What this machine can do at best: the denominators of every share."""

import time

import torch


def gemm_gflops(dtype: torch.dtype, *, rows: int = 1488, inner: int = 576, columns: int = 1536) -> float:
    """Return the best of several matrix products in GFLOP/s.

    Args:
        dtype: of both factors.
        rows: rows of the left factor.
        inner: the shared dimension.
        columns: columns of the right factor.
    """
    left, right = torch.randn(rows, inner, dtype=dtype), torch.randn(inner, columns, dtype=dtype)
    best = 0.0
    for _ in range(30):
        begin = time.perf_counter()
        torch.mm(left, right)
        best = max(best, 2 * rows * inner * columns / (time.perf_counter() - begin) / 1e9)
    return best


def steal_share() -> tuple[int, int]:
    """Return ticks stolen by the host, and all ticks, since boot (proc(5), /proc/stat)."""
    with open("/proc/stat") as stream:  # noqa: PTH123
        ticks = [int(value) for value in stream.readline().split()[1:]]
    return ticks[7], sum(ticks[:8])
