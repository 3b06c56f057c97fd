"""The kernels as compiled loops for a CPU: float32 arithmetic over float32 or bfloat16 memory, row by row.

Each does in one pass over memory what takes the plain operators many. numba compiles them when they are
first called and keeps the machine code on disk. numpy has no bfloat16, so its bits travel as uint16. No
flag that assumes finite numbers is set: what is no number must stay visible.
"""

# numba reads the loops themselves and takes their types from the arguments.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"
# ruff: noqa: ARG001, ARG005, PLW0108

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic, overload

# One pool of our own that sleeps between calls; an OpenMP one beside torch's would spin against it.
numba.config.THREADING_LAYER = "workqueue"

_FAST = {"contract", "reassoc", "arcp", "nsz", "afn"}
_kernel = njit(parallel=True, fastmath=_FAST, cache=True, error_model="numpy", nogil=True)
_inlined = njit(inline="always", fastmath=_FAST, error_model="numpy")

# numba widens integer arithmetic to 64 bits, which halves what a vector holds: the bit work is written in 32.
_I32, _I16, _F32 = ir.IntType(32), ir.IntType(16), ir.FloatType()


@intrinsic
def _from_bfloat16(_context: Any, bits: Any) -> Any:
    """Read the bits of a bfloat16 as a float32: they are its upper half."""

    def generate(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        wide = builder.zext(arguments[0], _I32)
        return builder.bitcast(builder.shl(wide, _I32(16)), _F32)

    return types.float32(types.uint16), generate


@intrinsic
def _to_bfloat16(_context: Any, value: Any) -> Any:
    """Return the bits of the nearest bfloat16, of two equally near ones the even."""

    def generate(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        bits = builder.bitcast(arguments[0], _I32)
        odd = builder.and_(builder.lshr(bits, _I32(16)), _I32(1))
        rounded = builder.add(bits, builder.add(odd, _I32(0x7FFF)))
        return builder.trunc(builder.lshr(rounded, _I32(16)), _I16)

    return types.uint16(types.float32), generate


@intrinsic
def _power_of_two(_context: Any, exponent: Any) -> Any:
    """Return 2 to a whole float32 from -126 to 127, by its bits."""

    def generate(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        biased = builder.add(builder.fptosi(arguments[0], _I32), _I32(127))
        return builder.bitcast(builder.shl(biased, _I32(23)), _F32)

    return types.float32(types.float32), generate


def _wide(stored):
    """Return what is stored as a float32."""


@overload(_wide, inline="always")
def _wide_overload(stored):
    if stored == types.uint16:
        return lambda stored: _from_bfloat16(stored)
    return lambda stored: stored


def _narrow(value, like):
    """Return a float32 as an array stores it."""


@overload(_narrow, inline="always")
def _narrow_overload(value, like):
    if like.dtype == types.uint16:
        return lambda value, like: _to_bfloat16(np.float32(value))
    return lambda value, like: np.float32(value)


@_inlined
def _exp(x):
    """e to the x in float32, within 2 units in the last place: 2^n times a polynomial on |r| <= ln(2)/2.

    The coefficients are those of the Taylor series to the 7th power. Below -87 the result is that of -87.
    """
    x = np.float32(-87.0) if x < np.float32(-87.0) else x
    x = np.float32(88.0) if x > np.float32(88.0) else x
    n = np.floor(x * np.float32(1.4426950408889634) + np.float32(0.5))
    # ln 2 in two parts, so that n times the first is exact.
    r = x - n * np.float32(0.693145751953125) - n * np.float32(1.428606765330187e-06)
    p = np.float32(1.0 / 5040)
    p = p * r + np.float32(1.0 / 720)
    p = p * r + np.float32(1.0 / 120)
    p = p * r + np.float32(1.0 / 24)
    p = p * r + np.float32(1.0 / 6)
    p = p * r + np.float32(0.5)
    p = p * r + np.float32(1.0)
    p = p * r + np.float32(1.0)
    return p * _power_of_two(n)


@_kernel
def rms_norm(x_ND, weight_D, epsilon, out_NK, inverse_N):
    """Write weight * x / rms(x) into the first D columns of out, and 1 / rms(x)."""
    size = x_ND.shape[1]
    for i in prange(x_ND.shape[0]):
        total = np.float32(0.0)
        for j in range(size):
            value = _wide(x_ND[i, j])
            total += value * value
        inverse = np.float32(1.0) / np.sqrt(total / np.float32(size) + np.float32(epsilon))
        inverse_N[i] = inverse
        for j in range(size):
            unit = _wide(_narrow(_wide(x_ND[i, j]) * inverse, out_NK))
            out_NK[i, j] = _narrow(unit * _wide(weight_D[j]), out_NK)


@_kernel
def rms_norm_backward(gradient_NK, x_ND, weight_D, inverse_N, out_ND):
    """Write the gradient of x from that of the normed and weighted x (its first D columns)."""
    size = x_ND.shape[1]
    for i in prange(x_ND.shape[0]):
        inverse = inverse_N[i]
        total = np.float32(0.0)
        for j in range(size):
            total += _wide(gradient_NK[i, j]) * _wide(weight_D[j]) * _wide(x_ND[i, j])
        shared = total * inverse * inverse / np.float32(size)
        for j in range(size):
            scaled = _wide(gradient_NK[i, j]) * _wide(weight_D[j])
            out_ND[i, j] = _narrow((scaled - _wide(x_ND[i, j]) * shared) * inverse, out_ND)


@_kernel
def gated_silu(gate_up_NF, out_NK, size):
    """Write silu(gate) * up into the first `size` columns of out."""
    for i in prange(gate_up_NF.shape[0]):
        for j in range(size):
            gate = _wide(gate_up_NF[i, j])
            activated = gate / (np.float32(1.0) + _exp(-gate))
            out_NK[i, j] = _narrow(activated * _wide(gate_up_NF[i, size + j]), out_NK)


@_kernel
def gated_silu_backward(gate_up_NF, gradient_NK, out_NF, hidden_NK, size):
    """Write the gradients of gate and up, and silu(gate) * up once more."""
    for i in prange(gate_up_NF.shape[0]):
        for j in range(size):
            gate = _wide(gate_up_NF[i, j])
            up = _wide(gate_up_NF[i, size + j])
            gradient = _wide(gradient_NK[i, j])
            share = np.float32(1.0) / (np.float32(1.0) + _exp(-gate))
            activated = gate * share
            slope = share + activated * (np.float32(1.0) - share)
            out_NF[i, j] = _narrow(gradient * up * slope, out_NF)
            out_NF[i, size + j] = _narrow(gradient * activated, out_NF)
            hidden_NK[i, j] = _narrow(activated * up, hidden_NK)


@_kernel
def split_heads(qkv_NE, cosine_TC, sine_TC, scale, query, key, value, start):
    """Turn queries and keys by their positions and lay all three out as the products want them.

    query [pairs, groups * T, C], times `scale`; key and value [pairs, start + T, C] from row `start` on;
    a pair is a row of the batch and a key head.
    """
    num_tokens, half = cosine_TC.shape
    size = 2 * half
    num_pairs, num_queries, _ = query.shape
    groups = num_queries // num_tokens
    num_kv_heads = qkv_NE.shape[1] // size // (groups + 2)
    num_heads = groups * num_kv_heads
    for pair in prange(num_pairs):
        row, head = pair // num_kv_heads, pair % num_kv_heads
        for t in range(num_tokens):
            n = row * num_tokens + t
            for group in range(groups):
                begin = (head * groups + group) * size
                q = group * num_tokens + t
                for c in range(half):
                    first, second = _wide(qkv_NE[n, begin + c]), _wide(qkv_NE[n, begin + half + c])
                    cosine, sine = cosine_TC[t, c], sine_TC[t, c]
                    query[pair, q, c] = _narrow((first * cosine - second * sine) * scale, query)
                    query[pair, q, half + c] = _narrow((second * cosine + first * sine) * scale, query)
            begin = (num_heads + head) * size
            for c in range(half):
                first, second = _wide(qkv_NE[n, begin + c]), _wide(qkv_NE[n, begin + half + c])
                cosine, sine = cosine_TC[t, c], sine_TC[t, c]
                key[pair, start + t, c] = _narrow(first * cosine - second * sine, key)
                key[pair, start + t, half + c] = _narrow(second * cosine + first * sine, key)
            begin = (num_heads + num_kv_heads + head) * size
            for c in range(size):
                value[pair, start + t, c] = qkv_NE[n, begin + c]


@_kernel
def split_heads_backward(query, key, value, cosine_TC, sine_TC, scale, out_NE, start):
    """Write the gradient of the products' output from those of what `split_heads` wrote."""
    num_tokens, half = cosine_TC.shape
    size = 2 * half
    num_pairs, num_queries, _ = query.shape
    groups = num_queries // num_tokens
    num_kv_heads = out_NE.shape[1] // size // (groups + 2)
    num_heads = groups * num_kv_heads
    for pair in prange(num_pairs):
        row, head = pair // num_kv_heads, pair % num_kv_heads
        for t in range(num_tokens):
            n = row * num_tokens + t
            for group in range(groups):
                begin = (head * groups + group) * size
                q = group * num_tokens + t
                for c in range(half):
                    first, second = _wide(query[pair, q, c]) * scale, _wide(query[pair, q, half + c]) * scale
                    cosine, sine = cosine_TC[t, c], sine_TC[t, c]
                    out_NE[n, begin + c] = _narrow(first * cosine + second * sine, out_NE)
                    out_NE[n, begin + half + c] = _narrow(second * cosine - first * sine, out_NE)
            begin = (num_heads + head) * size
            for c in range(half):
                first, second = _wide(key[pair, start + t, c]), _wide(key[pair, start + t, half + c])
                cosine, sine = cosine_TC[t, c], sine_TC[t, c]
                out_NE[n, begin + c] = _narrow(first * cosine + second * sine, out_NE)
                out_NE[n, begin + half + c] = _narrow(second * cosine - first * sine, out_NE)
            begin = (num_heads + num_kv_heads + head) * size
            for c in range(size):
                out_NE[n, begin + c] = value[pair, start + t, c]


@_kernel
def merge_heads(attended, out_NK, num_tokens):
    """Write [pairs, groups * T, C] as rows of tokens into the first columns of out."""
    num_pairs, num_queries, size = attended.shape
    groups = num_queries // num_tokens
    num_kv_heads = num_pairs * num_tokens // out_NK.shape[0]
    for pair in prange(num_pairs):
        row, head = pair // num_kv_heads, pair % num_kv_heads
        for group in range(groups):
            begin = (head * groups + group) * size
            for t in range(num_tokens):
                for c in range(size):
                    out_NK[row * num_tokens + t, begin + c] = attended[pair, group * num_tokens + t, c]


@_kernel
def merge_heads_backward(gradient_NK, out, num_tokens):
    """Write the gradient of [pairs, groups * T, C] from that of the rows of tokens."""
    num_pairs, num_queries, size = out.shape
    groups = num_queries // num_tokens
    num_kv_heads = num_pairs * num_tokens // gradient_NK.shape[0]
    for pair in prange(num_pairs):
        row, head = pair // num_kv_heads, pair % num_kv_heads
        for group in range(groups):
            begin = (head * groups + group) * size
            for t in range(num_tokens):
                for c in range(size):
                    out[pair, group * num_tokens + t, c] = gradient_NK[row * num_tokens + t, begin + c]


@_kernel
def causal_softmax(scores, num_tokens, start):
    """Turn scores [pairs, groups * T, start + T] into weights in place; a token sees what is up to itself."""
    num_pairs, num_queries, num_keys = scores.shape
    for index in prange(num_pairs * num_queries):
        pair, q = index // num_queries, index % num_queries
        seen = start + q % num_tokens + 1
        highest = _wide(scores[pair, q, 0])
        for j in range(seen):
            score = _wide(scores[pair, q, j])
            highest = score if score > highest else highest
        total = np.float32(0.0)
        for j in range(seen):
            total += _exp(_wide(scores[pair, q, j]) - highest)
        share = np.float32(1.0) / total
        for j in range(seen):
            weight = _exp(_wide(scores[pair, q, j]) - highest) * share
            scores[pair, q, j] = _narrow(weight, scores)
        for j in range(seen, num_keys):
            scores[pair, q, j] = _narrow(np.float32(0.0), scores)


@_kernel
def causal_softmax_backward(gradient, weights, num_tokens, start):
    """Turn the gradient of the weights into that of the scores, in place."""
    num_pairs, num_queries, num_keys = weights.shape
    for index in prange(num_pairs * num_queries):
        pair, q = index // num_queries, index % num_queries
        seen = start + q % num_tokens + 1
        total = np.float32(0.0)
        for j in range(seen):
            total += _wide(gradient[pair, q, j]) * _wide(weights[pair, q, j])
        for j in range(seen):
            change = (_wide(gradient[pair, q, j]) - total) * _wide(weights[pair, q, j])
            gradient[pair, q, j] = _narrow(change, gradient)
        for j in range(seen, num_keys):
            gradient[pair, q, j] = _narrow(np.float32(0.0), gradient)


@_kernel
def softmax_loss(logits_NV, targets_N, nll_N, is_right_N, keeps_gradient):
    """Write -log p(target) and whether it is the likeliest; turn logits into their gradient in place."""
    num_columns = logits_NV.shape[1]
    for i in prange(logits_NV.shape[0]):
        target = targets_N[i]
        aimed = _wide(logits_NV[i, target])
        highest = aimed
        for j in range(num_columns):
            logit = _wide(logits_NV[i, j])
            highest = logit if logit > highest else highest
        total = np.float32(0.0)
        for j in range(num_columns):
            total += _exp(_wide(logits_NV[i, j]) - highest)
        nll_N[i] = np.log(total) + highest - aimed
        is_right = aimed == highest
        if is_right:
            # Of equals the first counts, as argmax has it.
            for j in range(target):
                if _wide(logits_NV[i, j]) == highest:
                    is_right = False
        is_right_N[i] = is_right
        if keeps_gradient:
            share = np.float32(1.0) / total
            for j in range(num_columns):
                probability = _exp(_wide(logits_NV[i, j]) - highest) * share
                logits_NV[i, j] = _narrow(probability, logits_NV)
            hit = _exp(aimed - highest) * share
            logits_NV[i, target] = _narrow(hit - np.float32(1.0), logits_NV)
