"""The kernels as compiled loops for a CPU: float32 arithmetic over float32 or bfloat16 memory, row by row.

Each does in one pass over memory what takes the plain operators many. numba compiles them when they are
first called and keeps the machine code on disk. numpy has no bfloat16, so its bits travel as uint16. No
flag that assumes finite numbers is set: what is no number must stay visible.

A kernel is a C function of one pointer, so that torch's own pool of threads can run it (_threads.py): to a
table of int64 numbers, typed as what the tensors hold. The table begins with the address of
`omp_get_thread_num` and the number of threads; the arguments follow, tensors as addresses. Each thread
takes its share of the rows.
"""

# numba reads the loops themselves and takes their types from the arguments.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"
# ruff: noqa: ARG001, ARG005, PLW0108

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.extending import intrinsic, overload

_FAST = {"contract", "reassoc", "arcp", "nsz", "afn"}
_inlined = njit(inline="always", fastmath=_FAST, error_model="numpy")

_FIRST_ARGUMENT = 2
_TABLE_SIZE = 24

# numba widens integer arithmetic to 64 bits, which halves what a vector holds: the bit work is written in 32.
_I64, _I32, _I16, _F32 = ir.IntType(64), ir.IntType(32), ir.IntType(16), ir.FloatType()


class Kernel:
    """One kernel, compiled for each type when it is first wanted.

    Args:
        body: a function of the typed pointer.
    """

    def __init__(self, body: Callable[..., None]) -> None:
        self.name = body.__name__
        self._body = body
        self._addresses: dict[bool, int] = {}
        self._kept: list[Any] = []

    def address(self, *, is_bfloat16: bool) -> int:
        """Return the machine code's address."""
        if is_bfloat16 not in self._addresses:
            held = types.uint16 if is_bfloat16 else types.float32
            compiled = cfunc(
                types.void(types.CPointer(held)), cache=True, fastmath=_FAST, error_model="numpy"
            )(self._body)
            # The code lives as long as the object.
            self._kept.append(compiled)
            self._addresses[is_bfloat16] = compiled.address
        return self._addresses[is_bfloat16]


@intrinsic
def _table_of(_context: Any, data: Any) -> Any:
    """Read the kernel's pointer as one to int64."""

    def generate(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], _I64.as_pointer())

    return types.CPointer(types.int64)(data), generate


@intrinsic
def _at(_context: Any, address: Any, data: Any) -> Any:
    """Return an address as a pointer to what the tensors hold."""

    def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], target.get_value_type(signature.return_type))

    return data(types.int64, data), generate


def _pointer_to(held: Any) -> Any:
    @intrinsic
    def pointer(_context: Any, address: Any) -> Any:
        def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], target.get_value_type(signature.return_type))

        return types.CPointer(held)(types.int64), generate

    return pointer


_at_float32, _at_int64, _at_uint8 = (_pointer_to(held) for held in (types.float32, types.int64, types.uint8))


@intrinsic
def _number(_context: Any, bits: Any) -> Any:
    """Read the lower half of an int64 as a float32."""

    def generate(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.trunc(arguments[0], _I32), _F32)

    return types.float32(types.int64), generate


@intrinsic
def _call_thread_num(_context: Any, address: Any) -> Any:
    """Call `omp_get_thread_num` at its address."""

    def generate(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(_I32, ())
        return builder.sext(builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), ()), _I64)

    return types.int64(types.int64), generate


@_inlined
def _open(data):
    """Return the table behind a kernel's pointer."""
    return carray(_table_of(data), _TABLE_SIZE)


@_inlined
def _share(table, num_rows):
    """Return the first row of this thread and the one after its last."""
    if table[1] == 1:
        return 0, num_rows
    thread = _call_thread_num(table[0])
    return num_rows * thread // table[1], num_rows * (thread + 1) // table[1]


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


@Kernel
def rms_norm(data):
    """Write weight * x / rms(x) into the first columns of out, and 1 / rms(x)."""
    table = _open(data)
    num_rows, size, width, epsilon = table[2], table[3], table[4], _number(table[5])
    x_ND, weight_D = carray(_at(table[6], data), (num_rows, size)), carray(_at(table[7], data), size)
    out_NK = carray(_at(table[8], data), (num_rows, width))
    inverse_N = carray(_at_float32(table[9]), num_rows)
    begin, end = _share(table, num_rows)
    for i in range(begin, end):
        total = np.float32(0.0)
        for j in range(size):
            value = _wide(x_ND[i, j])
            total += value * value
        inverse = np.float32(1.0) / np.sqrt(total / np.float32(size) + epsilon)
        inverse_N[i] = inverse
        for j in range(size):
            unit = _wide(_narrow(_wide(x_ND[i, j]) * inverse, out_NK))
            out_NK[i, j] = _narrow(unit * _wide(weight_D[j]), out_NK)


@Kernel
def rms_norm_backward(data):
    """Write the gradient of x from that of the normed and weighted x (its first columns)."""
    table = _open(data)
    num_rows, size, width = table[2], table[3], table[4]
    gradient_NK = carray(_at(table[5], data), (num_rows, width))
    x_ND, weight_D = carray(_at(table[6], data), (num_rows, size)), carray(_at(table[7], data), size)
    inverse_N = carray(_at_float32(table[8]), num_rows)
    out_ND = carray(_at(table[9], data), (num_rows, size))
    begin, end = _share(table, num_rows)
    for i in range(begin, end):
        inverse = inverse_N[i]
        total = np.float32(0.0)
        for j in range(size):
            total += _wide(gradient_NK[i, j]) * _wide(weight_D[j]) * _wide(x_ND[i, j])
        shared = total * inverse * inverse / np.float32(size)
        for j in range(size):
            scaled = _wide(gradient_NK[i, j]) * _wide(weight_D[j])
            out_ND[i, j] = _narrow((scaled - _wide(x_ND[i, j]) * shared) * inverse, out_ND)


@Kernel
def gated_silu(data):
    """Write silu(gate) * up into the first columns of out."""
    table = _open(data)
    num_rows, size, width = table[2], table[3], table[4]
    gate_up_NF = carray(_at(table[5], data), (num_rows, 2 * size))
    out_NK = carray(_at(table[6], data), (num_rows, width))
    begin, end = _share(table, num_rows)
    for i in range(begin, end):
        for j in range(size):
            gate = _wide(gate_up_NF[i, j])
            activated = gate / (np.float32(1.0) + _exp(-gate))
            out_NK[i, j] = _narrow(activated * _wide(gate_up_NF[i, size + j]), out_NK)


@Kernel
def gated_silu_backward(data):
    """Write the gradients of gate and up, and silu(gate) * up once more."""
    table = _open(data)
    num_rows, size, width = table[2], table[3], table[4]
    gate_up_NF = carray(_at(table[5], data), (num_rows, 2 * size))
    gradient_NK = carray(_at(table[6], data), (num_rows, width))
    out_NF = carray(_at(table[7], data), (num_rows, 2 * size))
    hidden_NF = carray(_at(table[8], data), (num_rows, size))
    begin, end = _share(table, num_rows)
    for i in range(begin, end):
        for j in range(size):
            gate = _wide(gate_up_NF[i, j])
            up = _wide(gate_up_NF[i, size + j])
            gradient = _wide(gradient_NK[i, j])
            share = np.float32(1.0) / (np.float32(1.0) + _exp(-gate))
            activated = gate * share
            slope = share + activated * (np.float32(1.0) - share)
            out_NF[i, j] = _narrow(gradient * up * slope, out_NF)
            out_NF[i, size + j] = _narrow(gradient * activated, out_NF)
            hidden_NF[i, j] = _narrow(activated * up, hidden_NF)


@Kernel
def split_heads(data):
    """Turn queries and keys by their positions and lay all three out as the products want them.

    query [pairs, groups * T, C], times `scale`; key and value [pairs, start + T, C] from row `start` on;
    a pair is a row of the batch and a key head.
    """
    table = _open(data)
    num_pairs, num_kv_heads, groups, num_tokens, half = table[2], table[3], table[4], table[5], table[6]
    start, scale, size = table[7], _number(table[8]), 2 * table[6]
    num_heads = groups * num_kv_heads
    shape = (num_pairs // num_kv_heads * num_tokens, (num_heads + 2 * num_kv_heads) * size)
    qkv_NE = carray(_at(table[9], data), shape)
    cosine_TC = carray(_at_float32(table[10]), (num_tokens, half))
    sine_TC = carray(_at_float32(table[11]), (num_tokens, half))
    query = carray(_at(table[12], data), (num_pairs, groups * num_tokens, size))
    key = carray(_at(table[13], data), (num_pairs, start + num_tokens, size))
    value = carray(_at(table[14], data), (num_pairs, start + num_tokens, size))
    begin_pair, end_pair = _share(table, num_pairs)
    for pair in range(begin_pair, end_pair):
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


@Kernel
def split_heads_backward(data):
    """Write the gradient of the products' output from those of what `split_heads` wrote."""
    table = _open(data)
    num_pairs, num_kv_heads, groups, num_tokens, half = table[2], table[3], table[4], table[5], table[6]
    start, scale, size = table[7], _number(table[8]), 2 * table[6]
    num_heads = groups * num_kv_heads
    shape = (num_pairs // num_kv_heads * num_tokens, (num_heads + 2 * num_kv_heads) * size)
    out_NE = carray(_at(table[9], data), shape)
    cosine_TC = carray(_at_float32(table[10]), (num_tokens, half))
    sine_TC = carray(_at_float32(table[11]), (num_tokens, half))
    query = carray(_at(table[12], data), (num_pairs, groups * num_tokens, size))
    key = carray(_at(table[13], data), (num_pairs, start + num_tokens, size))
    value = carray(_at(table[14], data), (num_pairs, start + num_tokens, size))
    begin_pair, end_pair = _share(table, num_pairs)
    for pair in range(begin_pair, end_pair):
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


@Kernel
def merge_heads(data):
    """Write [pairs, groups * T, C] as rows of tokens into the first columns of out."""
    table = _open(data)
    num_pairs, num_kv_heads, groups, num_tokens, size = table[2], table[3], table[4], table[5], table[6]
    attended = carray(_at(table[8], data), (num_pairs, groups * num_tokens, size))
    out_NK = carray(_at(table[9], data), (num_pairs // num_kv_heads * num_tokens, table[7]))
    begin_pair, end_pair = _share(table, num_pairs)
    for pair in range(begin_pair, end_pair):
        row, head = pair // num_kv_heads, pair % num_kv_heads
        for group in range(groups):
            begin = (head * groups + group) * size
            for t in range(num_tokens):
                for c in range(size):
                    out_NK[row * num_tokens + t, begin + c] = attended[pair, group * num_tokens + t, c]


@Kernel
def merge_heads_backward(data):
    """Write the gradient of [pairs, groups * T, C] from that of the rows of tokens."""
    table = _open(data)
    num_pairs, num_kv_heads, groups, num_tokens, size = table[2], table[3], table[4], table[5], table[6]
    out = carray(_at(table[8], data), (num_pairs, groups * num_tokens, size))
    gradient_NK = carray(_at(table[9], data), (num_pairs // num_kv_heads * num_tokens, table[7]))
    begin_pair, end_pair = _share(table, num_pairs)
    for pair in range(begin_pair, end_pair):
        row, head = pair // num_kv_heads, pair % num_kv_heads
        for group in range(groups):
            begin = (head * groups + group) * size
            for t in range(num_tokens):
                for c in range(size):
                    out[pair, group * num_tokens + t, c] = gradient_NK[row * num_tokens + t, begin + c]


@Kernel
def causal_softmax(data):
    """Turn scores [pairs * groups * T, keys] into weights in place; a token sees what is up to itself."""
    table = _open(data)
    num_rows, num_keys, num_tokens, start = table[2], table[3], table[4], table[5]
    scores = carray(_at(table[6], data), (num_rows, num_keys))
    begin, end = _share(table, num_rows)
    for i in range(begin, end):
        seen = start + i % num_tokens + 1
        highest = _wide(scores[i, 0])
        for j in range(seen):
            score = _wide(scores[i, j])
            highest = score if score > highest else highest
        total = np.float32(0.0)
        for j in range(seen):
            total += _exp(_wide(scores[i, j]) - highest)
        share = np.float32(1.0) / total
        for j in range(seen):
            scores[i, j] = _narrow(_exp(_wide(scores[i, j]) - highest) * share, scores)
        for j in range(seen, num_keys):
            scores[i, j] = _narrow(np.float32(0.0), scores)


@Kernel
def causal_softmax_backward(data):
    """Turn the gradient of the weights into that of the scores, in place."""
    table = _open(data)
    num_rows, num_keys, num_tokens, start = table[2], table[3], table[4], table[5]
    weights = carray(_at(table[6], data), (num_rows, num_keys))
    gradient = carray(_at(table[7], data), (num_rows, num_keys))
    begin, end = _share(table, num_rows)
    for i in range(begin, end):
        seen = start + i % num_tokens + 1
        total = np.float32(0.0)
        for j in range(seen):
            total += _wide(gradient[i, j]) * _wide(weights[i, j])
        for j in range(seen):
            change = (_wide(gradient[i, j]) - total) * _wide(weights[i, j])
            gradient[i, j] = _narrow(change, gradient)
        for j in range(seen, num_keys):
            gradient[i, j] = _narrow(np.float32(0.0), gradient)


@Kernel
def softmax_loss(data):
    """Write -log p(target) and whether it is the likeliest; turn logits into their gradient in place."""
    table = _open(data)
    num_rows, num_columns, keeps_gradient = table[2], table[3], table[4]
    logits_NV = carray(_at(table[5], data), (num_rows, num_columns))
    targets_N = carray(_at_int64(table[6]), num_rows)
    nll_N, is_right_N = carray(_at_float32(table[7]), num_rows), carray(_at_uint8(table[8]), num_rows)
    begin, end = _share(table, num_rows)
    for i in range(begin, end):
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
        is_right_N[i] = np.uint8(is_right)
        if keeps_gradient != 0:
            share = np.float32(1.0) / total
            for j in range(num_columns):
                logits_NV[i, j] = _narrow(_exp(_wide(logits_NV[i, j]) - highest) * share, logits_NV)
            hit = _exp(aimed - highest) * share
            logits_NV[i, target] = _narrow(hit - np.float32(1.0), logits_NV)
