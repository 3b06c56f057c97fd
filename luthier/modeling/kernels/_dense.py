"""The compiled laying out of dense weights, and the products of their exceptions (dense.py)."""

# numba reads the loops themselves and takes their types from the arguments.
# What an intrinsic takes is in its arguments, which only the generated code reads.
# ruff: noqa: ARG001
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from luthier.modeling.kernels._language import Kernel, at, at_int64, at_uint8, inlined, open_table, share
from luthier.modeling.kernels._machine import BITS, SUMS, Machine
from luthier.modeling.kernels._memory import I32, I64, LANES, Body, broadcast, loop
from luthier.modeling.kernels.dense import (
    COUNT,
    DENSE_STEP_BYTES,
    DENSE_TILE_BYTES,
    EXCEPTIONS,
    HEADER_BYTES,
    NUM_BYTES,
)
from luthier.modeling.kernels.shapes import PANEL_OUTPUTS, TILE_INPUTS

_HALF = PANEL_OUTPUTS // 2
_TILE_OUTPUTS, _LINE = 16, 64
_NUM_CODES = 16


@inlined
def _upper_byte(bits):
    return np.int64(bits) >> 8


@Kernel
def find_upper_bytes(data):
    """Write each panel's header but for where its exceptions begin.

    The table has O, K, the addresses of the weight, of headers one behind the other, and of room, int64
    [panels, 2, 256] of zeros. Of a panel's the first 256 are the codes of bytes afterwards, -1 for those of
    exceptions.
    """
    table = open_table(data)
    num_outputs, num_inputs, weight_at, headers_at, room_at = table[2], table[3], table[4], table[5], table[6]
    begin, end = share(table, (num_outputs + PANEL_OUTPUTS - 1) // PANEL_OUTPUTS)
    for panel in range(begin, end):
        counts = carray(at_int64(room_at + panel * 2 * NUM_BYTES * 8), (2, NUM_BYTES))
        for output in range(min(PANEL_OUTPUTS, num_outputs - panel * PANEL_OUTPUTS)):
            row, half = panel * PANEL_OUTPUTS + output, output // _HALF
            weight = carray(at(weight_at + row * num_inputs * 2, data), num_inputs)
            for k in range(num_inputs):
                counts[half, _upper_byte(weight[k])] += 1
        header_at = headers_at + panel * HEADER_BYTES
        upper_bytes, numbers = carray(at_uint8(header_at), _NUM_CODES), carray(at_int64(header_at), 8)
        # What has a code is counted no more: it is no exception.
        upper_bytes[0] = np.uint8(0)
        counts[0, 0] = counts[1, 0] = 0
        for code in range(1, _NUM_CODES):
            best = 0
            for byte in range(NUM_BYTES):
                if counts[0, byte] + counts[1, byte] > counts[0, best] + counts[1, best]:
                    best = byte
            # Without a number left this is 0, whose code is the last that is written below.
            upper_bytes[code] = np.uint8(best)
            counts[0, best] = counts[1, best] = 0
        for half in range(2):
            numbers[COUNT + half] = 0
            for byte in range(NUM_BYTES):
                numbers[COUNT + half] += counts[half, byte]
        for byte in range(NUM_BYTES):
            counts[0, byte] = -1
        for code in range(_NUM_CODES - 1, -1, -1):
            counts[0, upper_bytes[code]] = code


@Kernel
def lay_panels(data):
    """Write each panel's tiles behind its header, and its exceptions where that says.

    The table has O, K, the addresses of the weight and of the panels, and of the codes (`find_upper_bytes`).
    """
    table = open_table(data)
    num_outputs, num_inputs, weight_at, panels_at, room_at = table[2], table[3], table[4], table[5], table[6]
    num_steps = num_inputs // TILE_INPUTS
    panel_bytes = HEADER_BYTES + num_steps * DENSE_STEP_BYTES
    begin, end = share(table, (num_outputs + PANEL_OUTPUTS - 1) // PANEL_OUTPUTS)
    for panel in range(begin, end):
        header_at, num_found = panels_at + panel * panel_bytes, 0
        codes = carray(at_int64(room_at + panel * 2 * NUM_BYTES * 8), NUM_BYTES)
        numbers = carray(at_int64(header_at), HEADER_BYTES // 8)
        exceptions = carray(at_int64(numbers[EXCEPTIONS]), numbers[COUNT] + numbers[COUNT + 1])
        for output in range(PANEL_OUTPUTS):
            row = panel * PANEL_OUTPUTS + output
            is_there = row < num_outputs
            weight = carray(at(weight_at + (row if is_there else 0) * num_inputs * 2, data), num_inputs)
            tile, own = output // _TILE_OUTPUTS, output % _TILE_OUTPUTS
            for step in range(num_steps):
                tile_at = header_at + HEADER_BYTES + step * DENSE_STEP_BYTES + tile * DENSE_TILE_BYTES
                lines = carray(at_uint8(tile_at), DENSE_TILE_BYTES)
                for number in range(TILE_INPUTS):
                    k, line = step * TILE_INPUTS + number, number // 2
                    bits = np.int64(weight[k]) if is_there else 0
                    code, lower = codes[_upper_byte(bits)], bits & 0xFF
                    if code < 0:
                        code = lower = 0
                        exceptions[num_found] = k << 32 | output << 16 | bits
                        num_found += 1
                    group, half, second = line // 4 * 3 * _LINE, line // 2 % 2, line % 2
                    place = own // 4 * 16 + second * 8 + own % 4 * 2 + number % 2
                    lines[group + (1 + half) * _LINE + place] = np.uint8(lower)
                    # Those of the first half come first.
                    before = np.int64(lines[group + place]) if half else 0
                    lines[group + place] = np.uint8(before | code << (4 * half))


@intrinsic
def _add_products(_context, sums, sums_stride, x, x_stride, num_rows, lane, bits):
    """Add the products of rows' pairs with one pair of weights, by its bits, to one of 16 sums of each.

    As whole vectors: to read a vector of which a part was just written, a processor waits.
    """

    def generate(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        sums, sums_stride, x, x_stride, num_rows, lane, bits = arguments
        machine = Machine(builder)
        everywhere = broadcast(builder, builder.trunc(bits, I32))
        lanes = ir.Constant(BITS, list(range(LANES)))
        is_own = builder.icmp_signed("==", lanes, broadcast(builder, builder.trunc(lane, I32)))
        line = builder.select(is_own, everywhere, ir.Constant(BITS, [0] * LANES))

        def rows(size: int) -> Body:
            def body(row: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
                for number in range(size):
                    own = builder.add(row, I64(number))
                    place = machine.pointer(builder.add(sums, builder.mul(own, sums_stride)), SUMS)
                    pair = machine.repeated(builder.add(x, builder.mul(own, x_stride)))
                    before = builder.load(place, align=4)
                    # The other sums stay as they are even if the row is infinite there.
                    total = builder.select(is_own, machine.multiply_pairs(before, pair, line), before)
                    builder.store(total, place, align=4)
                return []

            return body

        row: ir.Value = I64(0)
        for size in (4, 1):
            row, _ = loop(builder, row, num_rows, size, [], rows(size))
        return I64(0)

    return types.int64(*[types.int64] * 7), generate


@inlined
def add_exceptions(header_at, begins, ends, x_at, x_stride, num_rows, sums_at):
    """Add the products of a panel's exceptions to sums, float32 [rows, 64], or [rows, 32] of one half.

    They are those of the panel's halves from `begins` on and before `ends`.
    """
    numbers = carray(at_int64(header_at), HEADER_BYTES // 8)
    first = numbers[COUNT] if begins == 1 else 0
    last = numbers[COUNT] + numbers[COUNT + 1] if ends == 2 else numbers[COUNT]
    sums_stride = _HALF * (ends - begins) * 4
    exceptions = carray(at_int64(numbers[EXCEPTIONS]), last)
    for i in range(first, last):
        k, output = exceptions[i] >> 32, (exceptions[i] >> 16 & 0xFFFF) - begins * _HALF
        bits = (exceptions[i] & 0xFFFF) << (16 * (k & 1))
        own_at = sums_at + output // _TILE_OUTPUTS * _LINE
        pairs_at = x_at + k // 2 * 4
        _add_products(own_at, sums_stride, pairs_at, x_stride, num_rows, output % _TILE_OUTPUTS, bits)
