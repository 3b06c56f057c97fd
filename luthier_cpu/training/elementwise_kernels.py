"""Compiled kernels over rows: norm, gated activation, softmax, loss and split heads, forward and backward."""

# numba reads the loops themselves and takes their types from the arguments.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

import numpy as np
from numba import carray

from luthier_cpu.codegen.memory_access import item_size
from luthier_cpu.codegen.numba_kernel import (
    Kernel,
    at,
    at_float32,
    at_int64,
    at_uint8,
    exponential,
    inlined,
    narrow,
    number,
    open_table,
    share,
    wide,
)
from luthier_cpu.decode.kernels.head_rows import (
    copy_row,
    softmax_row,
    softmax_row_backward,
    turn_row,
    turn_row_back,
)


@Kernel
def rms_norm(data):
    """Write weight * x / rms(x) into the first columns of out, and 1 / rms(x)."""
    table = open_table(data)
    num_rows, size, width, epsilon = table[2], table[3], table[4], number(table[5])
    x_ND, weight_D = carray(at(table[6], data), (num_rows, size)), carray(at(table[7], data), size)
    out_NK = carray(at(table[8], data), (num_rows, width))
    inverse_N = carray(at_float32(table[9]), num_rows)
    begin, end = share(table, num_rows)
    for i in range(begin, end):
        total = np.float32(0.0)
        for j in range(size):
            value = wide(x_ND[i, j])
            total += value * value
        inverse = np.float32(1.0) / np.sqrt(total / np.float32(size) + epsilon)
        inverse_N[i] = inverse
        for j in range(size):
            unit = wide(narrow(wide(x_ND[i, j]) * inverse, out_NK))
            out_NK[i, j] = narrow(unit * wide(weight_D[j]), out_NK)


@Kernel
def rms_norm_backward(data):
    """Write the gradient of x from that of the normed and weighted x (its first columns)."""
    table = open_table(data)
    num_rows, size, width = table[2], table[3], table[4]
    gradient_NK = carray(at(table[5], data), (num_rows, width))
    x_ND, weight_D = carray(at(table[6], data), (num_rows, size)), carray(at(table[7], data), size)
    inverse_N = carray(at_float32(table[8]), num_rows)
    out_ND = carray(at(table[9], data), (num_rows, size))
    begin, end = share(table, num_rows)
    for i in range(begin, end):
        inverse = inverse_N[i]
        total = np.float32(0.0)
        for j in range(size):
            total += wide(gradient_NK[i, j]) * wide(weight_D[j]) * wide(x_ND[i, j])
        shared = total * inverse * inverse / np.float32(size)
        for j in range(size):
            scaled = wide(gradient_NK[i, j]) * wide(weight_D[j])
            out_ND[i, j] = narrow((scaled - wide(x_ND[i, j]) * shared) * inverse, out_ND)


@Kernel
def gated_silu(data):
    """Write silu(gate) * up into the first columns of out."""
    table = open_table(data)
    num_rows, size, width = table[2], table[3], table[4]
    gate_up_NF = carray(at(table[5], data), (num_rows, 2 * size))
    out_NK = carray(at(table[6], data), (num_rows, width))
    begin, end = share(table, num_rows)
    for i in range(begin, end):
        for j in range(size):
            gate = wide(gate_up_NF[i, j])
            activated = gate / (np.float32(1.0) + exponential(-gate))
            out_NK[i, j] = narrow(activated * wide(gate_up_NF[i, size + j]), out_NK)


@Kernel
def gated_silu_backward(data):
    """Write the gradients of gate and up, and silu(gate) * up once more."""
    table = open_table(data)
    num_rows, size, width = table[2], table[3], table[4]
    gate_up_NF = carray(at(table[5], data), (num_rows, 2 * size))
    gradient_NK = carray(at(table[6], data), (num_rows, width))
    out_NF = carray(at(table[7], data), (num_rows, 2 * size))
    hidden_NF = carray(at(table[8], data), (num_rows, size))
    begin, end = share(table, num_rows)
    for i in range(begin, end):
        for j in range(size):
            gate = wide(gate_up_NF[i, j])
            up = wide(gate_up_NF[i, size + j])
            gradient = wide(gradient_NK[i, j])
            sigmoid = np.float32(1.0) / (np.float32(1.0) + exponential(-gate))
            activated = gate * sigmoid
            slope = sigmoid + activated * (np.float32(1.0) - sigmoid)
            out_NF[i, j] = narrow(gradient * up * slope, out_NF)
            out_NF[i, size + j] = narrow(gradient * activated, out_NF)
            hidden_NF[i, j] = narrow(activated * up, hidden_NF)


@Kernel
def causal_softmax(data):
    """Turn scores [pairs * groups * T, keys] into weights in place; a token sees what is up to itself."""
    table = open_table(data)
    num_rows, num_keys, num_tokens, start, scores = table[2], table[3], table[4], table[5], table[6]
    row_bytes = num_keys * item_size(data)
    begin, end = share(table, num_rows)
    for i in range(begin, end):
        softmax_row(scores + i * row_bytes, start + i % num_tokens + 1, num_keys, data)


@Kernel
def causal_softmax_backward(data):
    """Turn the gradient of the weights into that of the scores, in place."""
    table = open_table(data)
    num_rows, num_keys, num_tokens, start = table[2], table[3], table[4], table[5]
    weights, gradient, row_bytes = table[6], table[7], num_keys * item_size(data)
    begin, end = share(table, num_rows)
    for i in range(begin, end):
        seen = start + i % num_tokens + 1
        softmax_row_backward(gradient + i * row_bytes, weights + i * row_bytes, seen, num_keys, data)


@Kernel
def softmax_loss(data):
    """Write -log p(target) and whether it is the likeliest; turn logits into their gradient in place."""
    table = open_table(data)
    num_rows, num_columns, keeps_gradient = table[2], table[3], table[4]
    logits_NV = carray(at(table[5], data), (num_rows, num_columns))
    targets_N = carray(at_int64(table[6]), num_rows)
    nll_N, is_right_N = carray(at_float32(table[7]), num_rows), carray(at_uint8(table[8]), num_rows)
    begin, end = share(table, num_rows)
    for i in range(begin, end):
        target = targets_N[i]
        aimed = wide(logits_NV[i, target])
        highest = aimed
        for j in range(num_columns):
            logit = wide(logits_NV[i, j])
            highest = logit if logit > highest else highest
        total = np.float32(0.0)
        for j in range(num_columns):
            total += exponential(wide(logits_NV[i, j]) - highest)
        nll_N[i] = np.log(total) + highest - aimed
        is_right = aimed == highest
        if is_right:
            # Of equals the first counts, as argmax has it.
            for j in range(target):
                if wide(logits_NV[i, j]) == highest:
                    is_right = False
        is_right_N[i] = np.uint8(is_right)
        if keeps_gradient != 0:
            inverse = np.float32(1.0) / total
            for j in range(num_columns):
                logits_NV[i, j] = narrow(exponential(wide(logits_NV[i, j]) - highest) * inverse, logits_NV)
            hit = exponential(aimed - highest) * inverse
            logits_NV[i, target] = narrow(hit - np.float32(1.0), logits_NV)


@inlined
def _places(table, pair, t, head_bytes):
    """Return where a token's first query, key and value are side by side, where by head, and its angles.

    From one query of a pair to the next there are `T` heads by head.
    """
    num_kv_heads, groups, num_tokens, half, start = table[3], table[4], table[5], table[6], table[7]
    row, head, num_heads = pair // num_kv_heads, pair % num_kv_heads, groups * num_kv_heads
    token = table[9] + (row * num_tokens + t) * (num_heads + 2 * num_kv_heads) * head_bytes
    key_at = token + (num_heads + head) * head_bytes
    beside = (token + head * groups * head_bytes, key_at, key_at + num_kv_heads * head_bytes)
    place = (pair * (start + num_tokens) + start + t) * head_bytes
    query_at = table[12] + (pair * groups * num_tokens + t) * head_bytes
    by_head = (query_at, table[13] + place, table[14] + place)
    return beside, by_head, (table[10] + t * half * 4, table[11] + t * half * 4)


@Kernel
def split_heads(data):
    """Turn queries and keys by their positions and write all three as the products want them.

    query [pairs, groups * T, C], times `scale`; key and value [pairs, start + T, C] from row `start` on;
    a pair is a row of the batch and a key head.
    """
    table = open_table(data)
    groups, num_tokens, half, scale, size = table[4], table[5], table[6], number(table[8]), 2 * table[6]
    head_bytes = size * item_size(data)
    begin_pair, end_pair = share(table, table[2])
    for pair in range(begin_pair, end_pair):
        for t in range(num_tokens):
            (query, key, value), (to_query, to_key, to_value), (cosines, sines) = _places(
                table, pair, t, head_bytes
            )
            for group in range(groups):
                target = to_query + group * num_tokens * head_bytes
                turn_row(query + group * head_bytes, target, cosines, sines, half, scale, data)
            turn_row(key, to_key, cosines, sines, half, 1.0, data)
            copy_row(value, to_value, size, data)


@Kernel
def split_heads_backward(data):
    """Write the gradient of the products' output from those of what `split_heads` wrote."""
    table = open_table(data)
    groups, num_tokens, half, scale, size = table[4], table[5], table[6], number(table[8]), 2 * table[6]
    head_bytes = size * item_size(data)
    begin_pair, end_pair = share(table, table[2])
    for pair in range(begin_pair, end_pair):
        for t in range(num_tokens):
            (to_query, to_key, to_value), (query, key, value), (cosines, sines) = _places(
                table, pair, t, head_bytes
            )
            for group in range(groups):
                source = query + group * num_tokens * head_bytes
                turn_row_back(source, to_query + group * head_bytes, cosines, sines, half, scale, data)
            turn_row_back(key, to_key, cosines, sines, half, 1.0, data)
            copy_row(value, to_value, size, data)
