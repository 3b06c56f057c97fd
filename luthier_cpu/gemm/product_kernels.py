"""The compiled product of a step's rows with a weight in tiles (gemm/tile_shapes.py).

A decode step has few rows and reads each weight once, so it takes as long as memory does. Panels of outputs
are shared out among the threads in halves.
"""

# numba reads the loops themselves and takes their types from the arguments.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from numba import carray

from luthier_cpu.codegen.instructions import LINE_BYTES, STEP_BYTES
from luthier_cpu.codegen.numba_kernel import (
    Kernel,
    at,
    at_float32,
    at_int64,
    inlined,
    narrow,
    open_table,
    share,
)
from luthier_cpu.gemm.bf16_gemm import multiply_half_panel, round_lanes
from luthier_cpu.gemm.bf16_gemv import (
    MOST_ADDRESSES,
    STEPS_TOGETHER,
    addresses_of_steps,
    multiply_half_row,
    multiply_panel,
    multiply_row,
    sums_of_panel,
)
from luthier_cpu.gemm.tile_shapes import MOST_ROWS, PANEL_OUTPUTS, TILE_INPUTS, TILE_ROWS

_BLOCK_ROWS = 2 * TILE_ROWS
_HALF, _HALF_BYTES = PANEL_OUTPUTS // 2, STEP_BYTES // 2
_LANES = 16


@inlined
def _write(sums_at, num_rows, width, num_columns, out_at, out_stride, data):
    """Round sums [rows, width] into the columns of the result that there are."""
    whole = num_columns // _LANES * _LANES
    for i in range(num_rows):
        source_at, target_at = sums_at + i * width * 4, out_at + i * out_stride
        for j in range(0, whole, _LANES):
            round_lanes(source_at + j * 4, target_at + j * 2)
        if whole < num_columns:
            source, target = carray(at_float32(source_at), width), carray(at(target_at, data), num_columns)
            for j in range(whole, num_columns):
                target[j] = narrow(source[j], target)


@inlined
def _multiply_half(table, half, data):
    """Write the products of any number of rows with half a panel."""
    num_rows, num_inputs, num_outputs = table[2], table[3], table[4]
    x_at, weight_at, out_at = table[5], table[6], table[7]
    sums_at, num_steps = sums_of_panel(), num_inputs // TILE_INPUTS
    x_stride, out_stride = num_inputs * 2, num_outputs * 2
    weights_at = weight_at + half // 2 * num_steps * STEP_BYTES + half % 2 * _HALF_BYTES
    num_columns = min(_HALF, num_outputs - half * _HALF)
    # It stays near the processor while all blocks of rows pass by.
    for row in range(0, num_rows, _BLOCK_ROWS):
        num_seen = min(_BLOCK_ROWS, num_rows - row)
        rows_at = x_at + row * x_stride
        if num_rows == 1:
            multiply_half_row(weights_at, rows_at, num_steps, sums_at)
        else:
            multiply_half_panel(weights_at, rows_at, x_stride, num_steps, num_seen, sums_at)
        target_at = out_at + row * out_stride + half * _HALF * 2
        _write(sums_at, num_seen, _HALF, num_columns, target_at, out_stride, data)


@inlined
def _fill_asked(table, panel, num_panels, num_parts, asked_at, otherwise):
    """Write what this thread prefetches during the parts of its panel of a number, of `num_panels`.

    What the next kernel reads of the adapters of this thread's rows is parted among the parts of all its
    panels, one row after the other.
    """
    adapters, entry = carray(at_int64(table[8]), table[2]), table[9]
    asked = carray(at_int64(asked_at), num_parts)
    first_row, last_row = share(table, table[2])
    num_rows, whole = last_row - first_row, num_panels * num_parts
    for part in range(num_parts):
        place = panel * num_parts + part
        row = place * num_rows // whole
        begin = (row * whole + num_rows - 1) // num_rows
        end = ((row + 1) * whole + num_rows - 1) // num_rows
        asked[part] = otherwise
        if adapters[first_row + row] != 0:
            region = carray(at_int64(adapters[first_row + row] + entry * 8), 2)
            if region[1] == 0:
                continue
            asked[part] = region[0] + region[1] * (place - begin) // (end - begin) // LINE_BYTES * LINE_BYTES


@Kernel
def tile_product(data):
    """Write x [N, K] times a weight [O, K]; K is a multiple of 32. Only for bfloat16.

    Halves of panels are shared out, so that no thread waits for another's last panel. A thread multiplies
    those that are whole as one, but more than 16 rows with each half by itself. Of 9 to 16 rows the table
    may have the address of the rows' adapters, and the entry of their tables at which is what the next kernel
    reads of them; it is asked for meanwhile.
    """
    table = open_table(data)
    num_rows, num_inputs, num_outputs = table[2], table[3], table[4]
    x_at, sums_at, num_steps = table[5], sums_of_panel(), num_inputs // TILE_INPUTS
    x_stride, out_stride = num_inputs * 2, num_outputs * 2
    first, last = share(table, (num_outputs + _HALF - 1) // _HALF)
    begin, end = (first + 1) // 2, last // 2
    for half in range(first, last):
        if num_rows > TILE_ROWS or half < 2 * begin or half >= 2 * end:
            _multiply_half(table, half, data)
    if num_rows > TILE_ROWS:
        return
    num_parts = (num_steps + STEPS_TOGETHER - 1) // STEPS_TOGETHER
    first_row, last_row = share(table, num_rows)
    has_asked = table[8] != 0 and first_row < last_row and num_parts <= MOST_ADDRESSES
    may_ask = num_rows > MOST_ROWS and has_asked
    asked_at = addresses_of_steps() if may_ask else 0
    for panel in range(begin, end):
        weights_at = table[6] + panel * num_steps * STEP_BYTES
        if may_ask:
            _fill_asked(table, panel - begin, end - begin, num_parts, asked_at, weights_at)
        if num_rows == 1:
            multiply_row(weights_at, x_at, num_steps, sums_at)
        else:
            multiply_panel(weights_at, x_at, x_stride, num_steps, num_rows, sums_at, asked_at)
        column = panel * PANEL_OUTPUTS
        num_columns = min(PANEL_OUTPUTS, num_outputs - column)
        _write(sums_at, num_rows, PANEL_OUTPUTS, num_columns, table[7] + column * 2, out_stride, data)
