"""Compiled kernels of a decode step: each row has one token, and maybe an adapter of its own.

A row's adapter is a table of int64 (batch_layout.py says what stands where), 0 for none, so that rows of any
mix of adapters are one call. Rows are shared out among the threads. How they attend is in paged_attention.py.
"""

# numba reads the loops themselves and takes their types from the arguments.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

import math

import numpy as np
from numba import carray

from luthier_cpu.codegen.instructions import are_paired
from luthier_cpu.codegen.memory_access import item_size
from luthier_cpu.codegen.numba_kernel import (
    Kernel,
    at,
    at_float32,
    at_int64,
    exponential,
    inlined,
    narrow,
    number,
    open_table,
    share,
    thread_number,
    wide,
)
from luthier_cpu.codegen.vectors import add_rows, dot_rows
from luthier_cpu.decode.blocks import BLOCK
from luthier_cpu.decode.kernels.low_rank_updates import add_pairs_to_row, dot_fours
from luthier_cpu.gemm.tile_shapes import TILE_INPUTS


@Kernel
def add_rms_norm(data):
    """Add the change to the stream where there is one, and write weight * x / rms(x) of the sum."""
    table = open_table(data)
    num_rows, size, epsilon, has_change = table[2], table[3], number(table[4]), table[5]
    stream_ND = carray(at(table[6], data), (num_rows, size))
    change_ND = carray(at(table[7], data), (num_rows, size))
    weight_D = carray(at(table[8], data), size)
    out_ND = carray(at(table[9], data), (num_rows, size))
    begin, end = share(table, num_rows)
    for i in range(begin, end):
        if has_change != 0:
            for j in range(size):
                stream_ND[i, j] = narrow(wide(stream_ND[i, j]) + wide(change_ND[i, j]), stream_ND)
        total = np.float32(0.0)
        for j in range(size):
            value = wide(stream_ND[i, j])
            total += value * value
        inverse = np.float32(1.0) / np.sqrt(total / np.float32(size) + epsilon)
        for j in range(size):
            unit = wide(narrow(wide(stream_ND[i, j]) * inverse, out_ND))
            out_ND[i, j] = narrow(unit * wide(weight_D[j]), out_ND)


@inlined
def _dot_rows(first, num_rows, x_at, wide_at, size, out_at, data):
    """Write the products of rows with x, float32 numbers at out; `wide_at` has room for x in float32."""
    if are_paired(data) and size % TILE_INPUTS == 0:
        dot_fours(first, num_rows, x_at, size, out_at, data)
        return
    source, target = carray(at(x_at, data), size), carray(at_float32(wide_at), size)
    for j in range(size):
        target[j] = wide(source[j])
    dot_rows(first, num_rows, wide_at, size, out_at, data)


@inlined
def _add_widened(blocks_at, middle_at, num_rows, out_at, size, factors_at, bias_at, data):
    sums_at, out = middle_at + num_rows * 4, carray(at(out_at, data), size)
    sums = carray(at_float32(sums_at), size)
    for j in range(size):
        sums[j] = wide(out[j])
    if bias_at != 0:
        bias = carray(at_float32(bias_at), size)
        for j in range(size):
            sums[j] += bias[j]
    block_bytes = num_rows * BLOCK * item_size(data)
    for block in range((size + BLOCK - 1) // BLOCK):
        begin = block * BLOCK
        first, num_columns = blocks_at + block * block_bytes, min(BLOCK, size - begin)
        add_rows(first, BLOCK, middle_at, num_rows, sums_at + begin * 4, num_columns, data)
    if factors_at != 0:
        factors = carray(at_float32(factors_at), size)
        for j in range(size):
            sums[j] *= factors[j]
    for j in range(size):
        out[j] = narrow(sums[j], out)


@inlined
def _add_middle(blocks_at, middle_at, num_rows, out_at, size, factors_at, bias_at, data):
    """Add a bias and a matrix in blocks, times float32 numbers, to a row; multiply the sums by factors.

    Bias and factors are 0 where there are none. Behind the middle there is room for a row in float32.
    """
    if are_paired(data):
        middle = carray(at_float32(middle_at), num_rows)
        rounded_at = middle_at + num_rows * 4
        rounded = carray(at(rounded_at, data), num_rows)
        for j in range(num_rows):
            rounded[j] = narrow(middle[j], rounded)
        add_pairs_to_row(blocks_at, num_rows, rounded_at, 0, 1, out_at, 0, size, factors_at, bias_at, data)
    else:
        _add_widened(blocks_at, middle_at, num_rows, out_at, size, factors_at, bias_at, data)


@Kernel
def add_low_rank(data):
    """Add `B (A x)` to the columns of each site, and multiply them by the site's factors where it has any."""
    table = open_table(data)
    num_rows, size, width, num_sites, first_entry = table[2], table[3], table[4], table[5], table[6]
    x_at, out_at = table[7], table[8]
    adapters = carray(at_int64(table[9]), num_rows)
    widths = carray(at_int64(table[10]), num_sites)
    wide_at = table[11] + thread_number(table) * table[12] * 4
    middle_at = wide_at + size * 4
    bytes_each = item_size(data)
    begin, end = share(table, num_rows)
    # The last first: where a product asked for the rows' adapters (product_kernels.py) it did that last, and
    # the other way would push out what is still near.
    for i in range(end - 1, begin - 1, -1):
        if adapters[i] == 0:
            continue
        entries = carray(at_int64(adapters[i] + first_entry * 8), num_sites * 4)
        own_at = out_at + i * width * bytes_each
        for site in range(num_sites):
            num_outputs, rank = widths[site], entries[4 * site + 2]
            if rank != 0:
                rows_at, blocks_at, factors_at = (
                    entries[4 * site],
                    entries[4 * site + 1],
                    entries[4 * site + 3],
                )
                _dot_rows(rows_at, rank, x_at + i * size * bytes_each, wide_at, size, middle_at, data)
                _add_middle(blocks_at, middle_at, rank, own_at, num_outputs, factors_at, 0, data)
            own_at += num_outputs * bytes_each


@inlined
def _activate(x, kind):
    """Return the activation of a kind: 1 gelu, 2 relu, 3 silu, 4 tanh."""
    if kind == 1:
        return np.float32(0.5) * x * np.float32(1.0 + math.erf(x * np.float32(0.7071067811865476)))
    if kind == 2:
        return x if x > np.float32(0.0) else np.float32(0.0)
    if kind == 3:
        return x / (np.float32(1.0) + exponential(-x))
    return np.float32(math.tanh(x))


@Kernel
def add_bottleneck(data):
    """Add `up(act(down(x)))` to each row of out; x is the row itself, or in parallel the half's input."""
    table = open_table(data)
    num_rows, size, first_entry = table[2], table[3], table[4]
    input_at, out_at = table[5], table[6]
    adapters = carray(at_int64(table[7]), num_rows)
    wide_at = table[8] + thread_number(table) * table[9] * 4
    middle_at = wide_at + size * 4
    bytes_each = item_size(data)
    begin, end = share(table, num_rows)
    for i in range(begin, end):
        if adapters[i] == 0:
            continue
        entries = carray(at_int64(adapters[i] + first_entry * 8), 7)
        middle_size = entries[4]
        if middle_size == 0:
            continue
        own_at = out_at + i * size * bytes_each
        x_at = own_at if entries[6] == 0 else input_at + i * size * bytes_each
        _dot_rows(entries[0], middle_size, x_at, wide_at, size, middle_at, data)
        middle = carray(at_float32(middle_at), middle_size)
        down_bias = carray(at_float32(entries[1]), middle_size)
        for j in range(middle_size):
            middle[j] = _activate(middle[j] + down_bias[j], entries[5])
        _add_middle(entries[2], middle_at, middle_size, own_at, size, 0, entries[3], data)
