"""The compiled kernels by name, and the element-wise ones of training as functions of tensors.

numba is imported when a kernel is first asked for. Nothing here is differentiable: the autograd functions of
luthier_cpu/training call these.

Legend: N tokens (rows times T), D inputs, K columns of a wide buffer of which the first D (F) are used, F the
feed-forward's size, E columns of q, k and v side by side, P pairs of a row and a key head, Q queries of a
pair (groups times T), S keys (start + T), C head size, V vocabulary.
"""

import struct
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

import torch

from luthier_cpu.codegen.openmp import launch

if TYPE_CHECKING:
    from luthier_cpu.codegen.numba_kernel import Kernel

_TYPES = {torch.float32, torch.bfloat16}
_FLOAT32, _INT32 = struct.Struct("=f"), struct.Struct("=i")
# Those of this file.
TRAINING = (
    "rms_norm",
    "rms_norm_backward",
    "gated_silu",
    "gated_silu_backward",
    "split_heads",
    "split_heads_backward",
    "causal_softmax",
    "causal_softmax_backward",
    "softmax_loss",
)
# Kernels of a decode step (decode/ops.py).
SERVING = ("add_rms_norm", "attend_pages", "add_low_rank", "add_bottleneck", "gated_silu")
# Those that choose tokens (decode/sampling.py).
CHOOSING = ("find_best", "draw")
# Those of weights in tiles, and the one that runs a step of kernels; for bfloat16 alone.
TILED = ("tile_product", "prefill_lora", "prefill_attention", "run_program")
_MODULES = (
    "codegen.kernel_graph",
    "decode.kernels.paged_attention",
    "decode.kernels.prefill_attention",
    "decode.kernels.prefill_lora",
    "decode.kernels.sampling_kernels",
    "decode.kernels.step_kernels",
    "gemm.panel_kernels",
    "gemm.panel_updates",
    "gemm.product_kernels",
    "training.elementwise_kernels",
    "training.pair_attention_kernels",
)


@cache
def _kernels() -> "dict[str, Kernel]":
    """Return all kernels by name; only where numba is installed."""
    from luthier_cpu.codegen.numba_kernel import KERNELS

    for name in _MODULES:
        import_module(f"luthier_cpu.{name}")
    return KERNELS


def is_compiled(tensor: torch.Tensor) -> bool:
    """Whether kernels work on tensors of this type and device."""
    return tensor.device.type == "cpu" and tensor.dtype in _TYPES


def has_pairs() -> bool:
    """Whether kernels multiply pairs of bfloat16."""
    from luthier_cpu.codegen.memory_access import HAS_PAIRS

    return HAS_PAIRS


def compiled_address(name: str, dtype: torch.dtype) -> int:
    """Return the address of a kernel's machine code for numbers of a type; only where `is_compiled`."""
    return _kernels()[name].address(is_bfloat16=dtype == torch.bfloat16)


def float_bits(value: float) -> int:
    """Return a number as kernels read it from their table: the bits of a float32, as a signed number.

    Raises:
        OverflowError: when it is finite and beyond what a float32 holds.
    """
    (bits,) = _INT32.unpack(_FLOAT32.pack(value))
    return int(bits)


def _run(name: str, arguments: Sequence[torch.Tensor | int | float], *, like: torch.Tensor) -> None:
    """Run a compiled kernel.

    Args:
        arguments: in the order of its table; tensors go as addresses, floats as the bits of a float32.
        like: a tensor of the type that it works on.
    """
    _check_that(is_compiled(like), f"{name} reads float32 or bfloat16 on the CPU.")
    launch(compiled_address(name, like.dtype), [_as_number(one) for one in arguments])


def _check(name: str, *expected: tuple[torch.Tensor, tuple[int, ...], torch.dtype]) -> None:
    """Refuse tensors that are not what a kernel will read at their addresses."""
    for tensor, shape, dtype in expected:
        if tuple(tensor.shape) != shape or tensor.dtype != dtype or tensor.device.type != "cpu":
            raise ValueError(
                f"{name} expects {dtype} of {shape} on the CPU, got {tensor.dtype} of "
                f"{tuple(tensor.shape)} on {tensor.device}."
            )


def _check_that(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(what)


def _as_number(argument: torch.Tensor | int | float) -> int:
    if isinstance(argument, torch.Tensor):
        if not argument.is_contiguous():
            raise ValueError("Kernels read whole contiguous tensors.")
        return argument.data_ptr()
    return float_bits(argument) if isinstance(argument, float) else argument


def rms_norm(
    x_ND: torch.Tensor, weight_D: torch.Tensor, epsilon: float, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalise rows by their root mean square (Zhang & Sennrich 2019, arXiv 1910.07467).

    Args:
        weight_D: factor of every column.
        width: K, columns of the result; those beyond D are not written.

    Returns:
        out_NK in x's type, and inverse_N float32, 1 over the root.
    """
    out_NK = x_ND.new_empty(x_ND.shape[0], width)
    _check("rms_norm", (weight_D, (x_ND.shape[1],), x_ND.dtype))
    _check_that(width >= x_ND.shape[1], "rms_norm: the result is narrower than its input.")
    inverse_N = torch.empty(x_ND.shape[0], dtype=torch.float32)
    sizes = (*x_ND.shape, width)
    _run("rms_norm", [*sizes, float(epsilon), x_ND, weight_D, out_NK, inverse_N], like=x_ND)
    return out_NK, inverse_N


def rms_norm_backward(
    gradient_NK: torch.Tensor, x_ND: torch.Tensor, weight_D: torch.Tensor, inverse_N: torch.Tensor
) -> torch.Tensor:
    """Return the gradient of x_ND from that of `rms_norm`'s result, of which the first D columns count."""
    num_rows, size = x_ND.shape
    width = gradient_NK.shape[1]
    _check(
        "rms_norm_backward",
        (gradient_NK, (num_rows, width), x_ND.dtype),
        (weight_D, (size,), x_ND.dtype),
        (inverse_N, (num_rows,), torch.float32),
    )
    _check_that(width >= size, "rms_norm_backward: the gradient is narrower than the input.")
    out_ND = torch.empty_like(x_ND)
    sizes = (num_rows, size, width)
    _run("rms_norm_backward", [*sizes, gradient_NK, x_ND, weight_D, inverse_N, out_ND], like=x_ND)
    return out_ND


def gated_silu(gate_up_NF: torch.Tensor, width: int) -> torch.Tensor:
    """Return silu(gate) * up (Shazeer 2020, arXiv 2002.05202) in the first columns of out_NK.

    Args:
        width: K, columns of the result; those beyond its half are not written.

    Returns:
        out_NK in the same type.
    """
    size = gate_up_NF.shape[1] // 2
    _check_that(width >= size, "gated_silu: the result is narrower than the gate.")
    out_NK = gate_up_NF.new_empty(gate_up_NF.shape[0], width)
    _run("gated_silu", [gate_up_NF.shape[0], size, width, gate_up_NF, out_NK], like=out_NK)
    return out_NK


def gated_silu_backward(
    gate_up_NF: torch.Tensor, gradient_NK: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradient of gate and up, and silu(gate) * up once more, which need not be kept so."""
    size = gate_up_NF.shape[1] // 2
    out_NF = torch.empty_like(gate_up_NF)
    hidden_NF = gate_up_NF.new_empty(gate_up_NF.shape[0], size)
    num_rows, width = gate_up_NF.shape[0], gradient_NK.shape[1]
    _check("gated_silu_backward", (gradient_NK, (num_rows, width), gate_up_NF.dtype))
    _check_that(width >= size, "gated_silu_backward: the gradient is narrower than the gate.")
    tensors = (gate_up_NF, gradient_NK, out_NF, hidden_NF)
    _run("gated_silu_backward", [num_rows, size, width, *tensors], like=out_NF)
    return out_NF, hidden_NF


def split_heads(
    qkv_NE: torch.Tensor,
    cosine_TC: torch.Tensor,
    sine_TC: torch.Tensor,
    *,
    scale: float,
    num_kv_heads: int,
    start: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Turn queries and keys by their positions (Su et al. 2021, arXiv 2104.09864) and part the heads.

    Args:
        qkv_NE: queries, keys and values of all heads side by side.
        cosine_TC: float32, of half a head's size.
        num_kv_heads: key heads; each serves the same number of query heads.
        start: rows left free before the keys and values, for virtual tokens.
    """
    num_tokens, half = cosine_TC.shape
    num_pairs = qkv_NE.shape[0] // num_tokens * num_kv_heads
    groups = qkv_NE.shape[1] // (2 * half) // num_kv_heads - 2
    shape = (num_pairs // num_kv_heads * num_tokens, (groups + 2) * num_kv_heads * 2 * half)
    turning = ((part, (num_tokens, half), torch.float32) for part in (cosine_TC, sine_TC))
    _check("split_heads", (qkv_NE, shape, qkv_NE.dtype), *turning)
    query = qkv_NE.new_empty(num_pairs, groups * num_tokens, 2 * half)
    key = qkv_NE.new_empty(num_pairs, start + num_tokens, 2 * half)
    value = torch.empty_like(key)
    sizes = (num_pairs, num_kv_heads, groups, num_tokens, half, start)
    tensors = (qkv_NE, cosine_TC, sine_TC, query, key, value)
    _run("split_heads", [*sizes, float(scale), *tensors], like=query)
    return query, key, value


def split_heads_backward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cosine_TC: torch.Tensor,
    sine_TC: torch.Tensor,
    *,
    scale: float,
    num_kv_heads: int,
    start: int,
    out_NE: torch.Tensor,
) -> None:
    """Write the gradient of qkv_NE from the gradients of what `split_heads` returned."""
    num_tokens = cosine_TC.shape[0]
    num_pairs, num_queries, size = query.shape
    groups = num_queries // num_tokens
    keys = ((part, (num_pairs, start + num_tokens, size), query.dtype) for part in (key, value))
    turning = ((part, (num_tokens, size // 2), torch.float32) for part in (cosine_TC, sine_TC))
    _check(
        "split_heads_backward",
        (query, (num_pairs, groups * num_tokens, size), query.dtype),
        (out_NE, (num_pairs // num_kv_heads * num_tokens, (groups + 2) * num_kv_heads * size), query.dtype),
        *keys,
        *turning,
    )
    sizes = (num_pairs, num_kv_heads, groups, num_tokens, size // 2, start)
    tensors = (out_NE, cosine_TC, sine_TC, query, key, value)
    _run("split_heads_backward", [*sizes, float(scale), *tensors], like=query)


def causal_softmax_(scores_PQS: torch.Tensor, num_tokens: int, start: int) -> torch.Tensor:
    """Turn scores into weights in place and return them.

    Args:
        scores_PQS: query q is token q mod `num_tokens`; it sees the first `start` keys and those of the
            tokens up to itself.
        num_tokens: tokens of the queries.
        start: keys that all queries see.

    Returns:
        The same tensor; 0 for keys that a query does not see.
    """
    fits = scores_PQS.shape[1] % num_tokens == 0 and scores_PQS.shape[2] >= start + num_tokens
    _check_that(fits, "causal_softmax_: the scores have too few keys, or parts of tokens.")
    num_keys = scores_PQS.shape[2]
    sizes = (scores_PQS.numel() // num_keys, num_keys, num_tokens, start)
    _run("causal_softmax", [*sizes, scores_PQS], like=scores_PQS)
    return scores_PQS


def causal_softmax_backward_(
    gradient_PQS: torch.Tensor, weights_PQS: torch.Tensor, num_tokens: int, start: int
) -> torch.Tensor:
    """Turn the gradient of the weights into that of the scores, in place, and return it."""
    fits = weights_PQS.shape[1] % num_tokens == 0 and weights_PQS.shape[2] >= start + num_tokens
    _check_that(fits, "causal_softmax_backward_: the weights have too few keys, or parts of tokens.")
    _check("causal_softmax_backward_", (gradient_PQS, tuple(weights_PQS.shape), weights_PQS.dtype))
    num_keys = weights_PQS.shape[2]
    sizes = (weights_PQS.numel() // num_keys, num_keys, num_tokens, start)
    _run("causal_softmax_backward", [*sizes, weights_PQS, gradient_PQS], like=weights_PQS)
    return gradient_PQS


def softmax_loss_(
    logits_NV: torch.Tensor, targets_N: torch.Tensor, *, keeps_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Score logits against targets, and turn them in place into their own gradient.

    Args:
        logits_NV: overwritten by softmax(logits) minus the target's one, when `keeps_gradient`.
        targets_N: int64.
        keeps_gradient: whether the gradient is wanted; otherwise the logits are left as they are.

    Returns:
        nll_N float32, and is_right_N bool: whether the target is the likeliest, of equals the first.
    """
    _check("softmax_loss_", (targets_N, (logits_NV.shape[0],), torch.int64))
    if targets_N.numel():
        lowest, highest = (int(bound) for bound in torch.aminmax(targets_N))
        _check_that(lowest >= 0 and highest < logits_NV.shape[1], "softmax_loss_: a target is no token.")
    nll_N = torch.empty(targets_N.shape[0], dtype=torch.float32)
    is_right_N = torch.empty(targets_N.shape[0], dtype=torch.bool)
    sizes = (*logits_NV.shape, int(keeps_gradient))
    _run("softmax_loss", [*sizes, logits_NV, targets_N, nll_N, is_right_N], like=logits_NV)
    return nll_N, is_right_N
