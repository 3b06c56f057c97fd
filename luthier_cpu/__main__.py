"""`python -m luthier_cpu`: compile all kernels now, so that no job waits for it later."""

import sys
import time

import torch

from luthier_cpu import refusal
from luthier_cpu.codegen import kernels
from luthier_cpu.gemm.products import has_tiles
from luthier_cpu.training.pair_attention import can_attend


def main() -> int:
    """Call every kernel once in each type; return the exit code."""
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
    """Have all kernels in this process, from the disk where they were compiled before."""
    for dtype in (torch.float32, torch.bfloat16):
        _call_all(dtype)


def _call_all(dtype: torch.dtype) -> None:
    """Run a tiny block forward and backward: two rows of four tokens, one key head of two query heads."""
    x_ND, ones_D = torch.zeros(8, 32, dtype=dtype), torch.ones(32, dtype=dtype)
    normed_NK, inverse_N = kernels.rms_norm(x_ND, ones_D, 1e-5, 32)
    kernels.rms_norm_backward(normed_NK, x_ND, ones_D, inverse_N)
    gate_up_NF = torch.zeros(8, 64, dtype=dtype)
    kernels.gated_silu_backward(gate_up_NF, kernels.gated_silu(gate_up_NF, 32))
    turning = torch.zeros(4, 4), torch.zeros(4, 4)
    heads = kernels.split_heads(x_ND, *turning, scale=1.0, num_kv_heads=1, start=0)
    kernels.split_heads_backward(
        *heads, *turning, scale=1.0, num_kv_heads=1, start=0, out_NE=torch.empty_like(x_ND)
    )
    weights_PQS = kernels.causal_softmax_(torch.zeros(2, 8, 4, dtype=dtype), 4, 0)
    kernels.causal_softmax_backward_(weights_PQS.clone(), weights_PQS, 4, 0)
    kernels.softmax_loss_(x_ND, torch.zeros(8, dtype=torch.int64), keeps_gradient=True)
    for name in (*kernels.SERVING, *kernels.CHOOSING):
        kernels.compiled_address(name, dtype)
    if dtype == torch.bfloat16:
        # Compiles and tries products by panels and attention by pairs where there are such.
        can_attend(torch.empty(1, 1, 32, dtype=dtype))


if __name__ == "__main__":
    sys.exit(main())
