"""The compiled low-rank halves of a training step's products, and the gradients of updates, by panels.

Parts and panels are those of gemm/panel_kernels.py.
"""

# numba reads the loops themselves and takes their types from the arguments.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from numba import carray

from luthier_cpu.codegen.numba_kernel import (
    ONE,
    Kernel,
    at_float32,
    at_int64,
    inlined,
    number,
    open_scratch,
    open_table,
    share,
)
from luthier_cpu.gemm.bf16_gemm import interleave
from luthier_cpu.gemm.panel_blocks import (
    finish_1_row_of_tile,
    finish_16_rows_of_tile,
    keep_8_rows,
    pack_scaled_pairs,
    pair_lines,
    pair_scaled_line,
)
from luthier_cpu.gemm.panel_kernels import SCRATCH, TILE, find_part, num_panels
from luthier_cpu.gemm.panel_products import (
    BLOCK_ROWS,
    FIRST_COLUMN,
    FIRST_OUTPUT,
    GRADIENT_A,
    GRADIENT_B,
    HEAD_BYTES,
    LINE_BYTES,
    NUM_FACTS,
    NUM_OUTPUTS,
    PANEL_COLUMNS,
    RANK,
    SCALE,
    A,
    B,
)

_TILE_BYTES = 64


@Kernel
def panel_low_rank(data):
    """Write u [N, U]: every part's x times its `a`; backward, its outputs' y times its `scale * b`.

    Columns that fill a rank up repeat its last one, or are zeros; what reads them has zeros there.
    """
    table = open_table(data)
    num_rows, num_inputs, is_backward = table[2], table[3], table[9] != 0
    x_at, x_stride, out_at, out_stride, num_parts = table[5], table[6], table[10], table[11], table[17]
    facts = carray(at_int64(table[16]), (num_parts, NUM_FACTS))
    scratch_at = open_scratch(table, SCRATCH, LINE_BYTES)
    panel_at = scratch_at + HEAD_BYTES
    begin, end = share(table, (num_rows + TILE - 1) // TILE)
    begin_row, end_row = begin * TILE, min(end * TILE, num_rows)
    for part in range(num_parts):
        rank = facts[part, RANK]
        num_pairs = (facts[part, NUM_OUTPUTS] if is_backward else num_inputs) // 2
        own_at = x_at + facts[part, FIRST_OUTPUT] * 2 if is_backward else x_at
        for first in range(0, rank, TILE):
            num_ranks = min(TILE, rank - first)
            if is_backward:
                for pair in range(num_pairs):
                    row_at = facts[part, B] + (2 * pair * rank + first) * 4
                    target_at = panel_at + pair * _TILE_BYTES
                    pair_scaled_line(row_at, row_at + rank * 4, num_ranks, 1, facts[part, SCALE], target_at)
            else:
                for pair in range(0, num_pairs, 16):
                    source_at = facts[part, A] + (first * num_inputs + 2 * pair) * 4
                    target_at = panel_at + pair * _TILE_BYTES
                    pack_scaled_pairs(source_at, num_inputs * 4, num_ranks, 32, ONE, target_at, _TILE_BYTES)
            row = begin_row
            while row < end_row:
                if row + TILE > end_row and begin_row + TILE <= end_row:
                    # Some rows are made again, the same.
                    row = end_row - TILE
                is_block = row + TILE <= end_row
                row_at = own_at + row * x_stride
                target_at = out_at + row * out_stride + (facts[part, FIRST_COLUMN] + first) * 2
                if is_block:
                    finish_16_rows_of_tile(
                        panel_at, num_pairs, row_at, x_stride, 4,
                        panel_at, 0, 0, 0, 0,
                        scratch_at, 0, target_at, out_stride, scratch_at, 0, TILE,
                    )  # fmt: skip
                else:
                    finish_1_row_of_tile(
                        panel_at, num_pairs, row_at, x_stride, 4,
                        panel_at, 0, 0, 0, 0,
                        scratch_at, 0, target_at, out_stride, scratch_at, 0, TILE,
                    )  # fmt: skip
                row += TILE if is_block else 1


@inlined
def _pair_rows(source_at, stride, num_rows, width, zeros_at, target_at):
    """Lay columns of rows of bfloat16 as pairs of two rows; width, how many, is a multiple of 16."""
    for pair in range((num_rows + 1) // 2):
        even_at = source_at + 2 * pair * stride
        odd_at = even_at + stride
        for column in range(0, width, TILE):
            own_at = odd_at + column * 2 if 2 * pair + 1 < num_rows else zeros_at
            interleave(even_at + column * 2, own_at, target_at + (pair * width + column) * 4)


@inlined
def _write_rows(sums_at, num_rows, num_columns, target_at, stride):
    """Write a block's sums."""
    sums = carray(at_float32(sums_at), (BLOCK_ROWS, PANEL_COLUMNS))
    for i in range(num_rows):
        target = carray(at_float32(target_at + i * stride * 4), num_columns)
        for column in range(num_columns):
            target[column] = sums[i, column]


@inlined
def _write_columns(sums_at, num_rows, num_columns, scale, target_at, stride):
    """Write a block's sums turned, times a scale."""
    sums = carray(at_float32(sums_at), (BLOCK_ROWS, PANEL_COLUMNS))
    for column in range(num_columns):
        target = carray(at_float32(target_at + column * stride * 4), num_rows)
        for i in range(num_rows):
            target[i] = sums[i, column] * scale


@Kernel
def panel_update_gradients(data):
    """Write every part's gradients, float32: of `a`, the gradient of u times x, of `b`, scale y' u."""
    table = open_table(data)
    num_rows, num_inputs = table[2], table[3]
    x_at, x_stride, y_at, y_stride = table[5], table[6], table[7], table[8]
    u_at, gradient_u_at, width, num_parts = table[10], table[11], table[12], table[17]
    facts = carray(at_int64(table[16]), (num_parts, NUM_FACTS))
    scratch_at = open_scratch(table, SCRATCH, LINE_BYTES)
    sums_at, num_pairs = scratch_at + LINE_BYTES, (num_rows + 1) // 2
    pairs_at = scratch_at + HEAD_BYTES
    panel_at = pairs_at + num_pairs * width * 4
    num_input_panels = num_panels(num_inputs)
    total = num_input_panels
    for part in range(num_parts):
        total += num_panels(facts[part, NUM_OUTPUTS])
    # The part of which u is packed in pairs; -1 is the gradient of all of u, for the panels of inputs, first.
    packed = -2
    begin, end = share(table, total)
    for panel in range(begin, end):
        part, is_input = 0, panel < num_input_panels
        if is_input:
            first = panel * PANEL_COLUMNS
            columns, source_at, stride = min(PANEL_COLUMNS, num_inputs - first), x_at + first * 2, x_stride
            wanted, rows_at, num_ranks = -1, gradient_u_at, width
        else:
            part, own = find_part(facts, panel - num_input_panels)
            if facts[part, RANK] == 0:
                continue
            first = own * PANEL_COLUMNS
            columns = min(PANEL_COLUMNS, facts[part, NUM_OUTPUTS] - first)
            source_at, stride = y_at + (facts[part, FIRST_OUTPUT] + first) * 2, y_stride
            wanted, rows_at = part, u_at + facts[part, FIRST_COLUMN] * 2
            num_ranks = (facts[part, RANK] + TILE - 1) // TILE * TILE
        if wanted != packed:
            _pair_rows(rows_at, width * 2, num_rows, num_ranks, scratch_at, pairs_at)
            packed = wanted
        for pair in range(num_pairs):
            row_at = source_at + 2 * pair * stride
            has_odd = 2 * pair + 1 < num_rows
            pair_lines(row_at, row_at + stride, columns, has_odd, panel_at + pair * LINE_BYTES)
        for which in range(0 if is_input else part, num_parts if is_input else part + 1):
            rank = facts[which, RANK]
            own_at = pairs_at + (facts[which, FIRST_COLUMN] * 4 if is_input else 0)
            for rank_begin in range(0, rank, BLOCK_ROWS):
                keep_8_rows(
                    panel_at,
                    num_pairs,
                    own_at + rank_begin * 4,
                    4,
                    num_ranks * 4,
                    scratch_at,
                    0,
                    sums_at,
                    LINE_BYTES,
                )
                num_sums = min(BLOCK_ROWS, rank - rank_begin)
                if is_input:
                    target_at = facts[which, GRADIENT_A] + (rank_begin * num_inputs + first) * 4
                    _write_rows(sums_at, num_sums, columns, target_at, num_inputs)
                else:
                    target_at = facts[which, GRADIENT_B] + (first * rank + rank_begin) * 4
                    _write_columns(sums_at, num_sums, columns, number(facts[which, SCALE]), target_at, rank)
