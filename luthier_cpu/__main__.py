"""`python -m luthier_cpu`: compile all kernels now, so that no job waits for it later."""

import sys
import time

import torch

from luthier_cpu import refusal
from luthier_cpu.codegen import kernels
from luthier_cpu.gemm.products import has_tiles
from luthier_cpu.training.pair_attention import can_attend


def main() -> int:
    """Compile every kernel for each type; return the exit code."""
    started_at = time.monotonic()
    reason = refusal("cpu")
    if reason is not None:
        print(f"{reason} Training works by torch's operators, more slowly.")
        return 0
    load_all()
    # What serving alone needs.
    if has_tiles():
        for name in kernels.TILED:
            kernels.compiled_address(name, torch.bfloat16)
    print(f"Kernels compiled in {time.monotonic() - started_at:.1f} s.")
    return 0


def load_all() -> None:
    """Have the kernels of training in this process, from the disk where they were compiled before."""
    for dtype in (torch.float32, torch.bfloat16):
        for name in (*kernels.TRAINING, *kernels.SERVING, *kernels.CHOOSING):
            kernels.compiled_address(name, dtype)
    # Compiles and tries products by panels and attention by pairs where there are such.
    can_attend(torch.empty(1, 1, 32, dtype=torch.bfloat16))


if __name__ == "__main__":
    sys.exit(main())
