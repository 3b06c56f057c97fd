"""The compiled products of a training step with a weight and its low-rank updates, bfloat16 by panels.

Every product sums over pairs of numbers. Of the factor that is not taken row by row a panel of 48 columns is
packed at a time (panel_blocks.py), in memory that stays near the processor while all rows pass by: that
costs a hundredth of the product, and no weight is in memory twice. Low-rank updates are a few more pairs of
the same sums. Panels are shared out among the threads, rows too where there are more threads than panels;
what is added in which order depends on neither.

A part is a layer of several that share an input: its update `scale * b a`, which of the outputs it has, and
which of the columns of u, its rank filled up to a multiple of 16.
"""

# numba reads the loops themselves and takes their types from the arguments.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from numba import carray

from luthier_cpu.codegen.numba_kernel import (
    ONE,
    Kernel,
    at_int64,
    inlined,
    open_scratch,
    open_table,
    share,
)
from luthier_cpu.codegen.vectors import prefetch_lines
from luthier_cpu.gemm.panel_blocks import (
    finish_1_row,
    finish_8_rows,
    keep_1_row,
    keep_8_rows,
    pack_pairs,
    pack_scaled_pairs,
    pair_lines,
    pair_scaled_line,
)
from luthier_cpu.gemm.panel_products import (
    BLOCK_ROWS,
    FIRST_COLUMN,
    FIRST_OUTPUT,
    HEAD_BYTES,
    LINE_BYTES,
    MOST_PAIRS,
    NUM_FACTS,
    NUM_OUTPUTS,
    PANEL_COLUMNS,
    RANK,
    SCALE,
    A,
    B,
)

TILE = 16
# Of a kernel's table: where its threads' memory is.
SCRATCH = 18


@inlined
def _pack_weight(weight_at, stride, first, num_columns, start, num_pairs, is_backward, panel_at):
    """Lay pairs of a weight's rows (of its columns, backward) for columns of a product."""
    if is_backward:
        for pair in range(num_pairs):
            row_at = weight_at + 2 * (start + pair) * stride + first * 2
            pair_lines(row_at, row_at + stride, num_columns, 1, panel_at + pair * LINE_BYTES)
    else:
        for column in range(0, num_columns, TILE):
            source_at = weight_at + (first + column) * stride + start * 4
            for pair in range(0, num_pairs, 16):
                target_at = panel_at + pair * LINE_BYTES + column * 4
                pack_pairs(
                    source_at + pair * 4, stride, min(TILE, num_columns - column), target_at, LINE_BYTES
                )


@inlined
def _pack_b(b_at, rank, scale, num_columns, panel_at):
    """Lay a part's `scale * b` [O, R], from its panel's first output on."""
    for column in range(0, num_columns, TILE):
        for first in range(0, rank, 32):
            pack_scaled_pairs(
                b_at + (column * rank + first) * 4,
                rank * 4,
                min(TILE, num_columns - column),
                rank - first,
                scale,
                panel_at + first // 2 * LINE_BYTES + column * 4,
                LINE_BYTES,
            )


@inlined
def _pack_a(facts, num_parts, num_inputs, first, num_columns, panel_at):
    """Lay every part's `a` [R, D] one below the other, zeros where ranks are filled up; return the pairs."""
    num_pairs = 0
    for part in range(num_parts):
        rank = facts[part, RANK]
        num_pairs = max(num_pairs, facts[part, FIRST_COLUMN] // 2 + (rank + TILE - 1) // TILE * (TILE // 2))
        for pair in range((rank + TILE - 1) // TILE * (TILE // 2)):
            row_at = facts[part, A] + (2 * pair * num_inputs + first) * 4
            line_at = panel_at + (facts[part, FIRST_COLUMN] // 2 + pair) * LINE_BYTES
            meant = num_columns if 2 * pair < rank else 0
            for column in range(0, PANEL_COLUMNS, TILE):
                pair_scaled_line(
                    row_at + column * 4,
                    row_at + (num_inputs + column) * 4,
                    max(meant - column, 0),
                    2 * pair + 1 < rank,
                    ONE,
                    line_at + column * 4,
                )
    return num_pairs


@inlined
def num_panels(num_columns):
    return (num_columns + PANEL_COLUMNS - 1) // PANEL_COLUMNS


@inlined
def find_part(facts, panel):
    """Return which part a panel of all parts' outputs belongs to, and which of its panels it is."""
    part = 0
    while panel >= num_panels(facts[part, NUM_OUTPUTS]):
        panel -= num_panels(facts[part, NUM_OUTPUTS])
        part += 1
    return part, panel


@inlined
def _multiply_rows(
    begin_row, end_row, panel_at, num_pairs, x_at, x_stride, low_at, low_pairs, u_at, u_stride,
    is_first, is_last, sums_at, zeros_at, residual_at, residual_stride, out_at, out_stride, num_columns,
    ahead_at, ahead_stride, num_ahead,
):  # fmt: skip
    """Multiply rows with a panel, block by block; the last of several panels rounds their sums."""
    num_blocks = (end_row - begin_row + BLOCK_ROWS - 1) // BLOCK_ROWS
    row, asked, block = begin_row, 0, 0
    while row < end_row:
        # What is packed next is prefetched meanwhile, some by each block.
        block += 1
        while asked < min(num_ahead, num_ahead * block // num_blocks):
            prefetch_lines(ahead_at + asked * ahead_stride, (num_pairs + 15) // 16)
            asked += 1
        if row + BLOCK_ROWS > end_row and begin_row + BLOCK_ROWS <= end_row and is_first and is_last:
            # Some rows are made again, the same; a sum that continues must not be.
            row = end_row - BLOCK_ROWS
        is_block = row + BLOCK_ROWS <= end_row
        own_at, own_sums_at = x_at + row * x_stride, sums_at + (row - begin_row) * LINE_BYTES
        before_at, before_stride = (zeros_at, 0) if is_first else (own_sums_at, LINE_BYTES)
        low_row_at, target_at = u_at + row * u_stride, out_at + row * out_stride
        # Zeros where nothing is added: a masked load of memory that is not there is very slow.
        added_at, added_stride = zeros_at, 0
        if residual_at != 0:
            added_at, added_stride = residual_at + row * residual_stride, residual_stride
        if is_last and is_block:
            finish_8_rows(
                panel_at, num_pairs, own_at, x_stride, 4, low_at, low_pairs, low_row_at, u_stride, 4,
                before_at, before_stride, target_at, out_stride, added_at, added_stride, num_columns,
            )  # fmt: skip
        elif is_last:
            finish_1_row(
                panel_at, num_pairs, own_at, x_stride, 4, low_at, low_pairs, low_row_at, u_stride, 4,
                before_at, before_stride, target_at, out_stride, added_at, added_stride, num_columns,
            )  # fmt: skip
        elif is_block:
            keep_8_rows(
                panel_at, num_pairs, own_at, x_stride, 4, before_at, before_stride, own_sums_at, LINE_BYTES
            )
        else:
            keep_1_row(
                panel_at, num_pairs, own_at, x_stride, 4, before_at, before_stride, own_sums_at, LINE_BYTES
            )
        row += BLOCK_ROWS if is_block else 1


@Kernel
def panel_product(data):
    """Write x [N, D] times a weight [O, D] and its updates, plus a residual.

    Backward, write y [N, O] times them.
    """
    table = open_table(data)
    num_rows, num_summed, num_columns = table[2], table[3], table[4]
    x_at, x_stride, weight_at, weight_stride = table[5], table[6], table[7], table[8]
    is_backward, out_at, out_stride = table[9] != 0, table[10], table[11]
    residual_at, residual_stride, u_at, u_stride = table[12], table[13], table[14], table[15]
    num_parts, num_chunks, low_bytes = table[17], table[20], table[21]
    most_tasks, chunk_rows = table[22], table[23]
    facts = carray(at_int64(table[16]), (num_parts, NUM_FACTS))
    scratch_at = open_scratch(table, SCRATCH, LINE_BYTES)
    low_at = scratch_at + HEAD_BYTES
    panel_at = low_at + low_bytes
    num_pairs = num_summed // 2
    most_pairs = min(MOST_PAIRS, num_pairs)
    sums_at = panel_at + most_pairs * LINE_BYTES
    total = 0
    if is_backward:
        total = num_panels(num_columns)
    else:
        for part in range(num_parts):
            total += num_panels(facts[part, NUM_OUTPUTS])
    begin, end = share(table, total * num_chunks)
    # There is room for the sums of `most_tasks` panels; a team may be smaller than was asked for.
    for group in range(begin, end, most_tasks):
        # Of a sum over many pairs what is read of the weight is used by all panels while it is near.
        for item in range((num_pairs + most_pairs - 1) // most_pairs * most_tasks):
            start, task = item // most_tasks * most_pairs, group + item % most_tasks
            if task >= end:
                continue
            own_pairs = min(most_pairs, num_pairs - start)
            is_last = start + own_pairs == num_pairs
            panel, chunk = task // num_chunks, task % num_chunks
            low_pairs, own_u_at = 0, u_at
            if is_backward:
                first = panel * PANEL_COLUMNS
                columns = min(PANEL_COLUMNS, num_columns - first)
                if u_at != 0 and is_last:
                    low_pairs = _pack_a(facts, num_parts, num_columns, first, columns, low_at)
            else:
                part, own = find_part(facts, panel)
                within, rank = own * PANEL_COLUMNS, facts[part, RANK]
                first, columns = (
                    facts[part, FIRST_OUTPUT] + within,
                    min(PANEL_COLUMNS, facts[part, NUM_OUTPUTS] - within),
                )
                if rank != 0 and is_last:
                    low_pairs, own_u_at = (rank + 1) // 2, u_at + facts[part, FIRST_COLUMN] * 2
                    _pack_b(facts[part, B] + within * rank * 4, rank, facts[part, SCALE], columns, low_at)
            _pack_weight(weight_at, weight_stride, first, columns, start, own_pairs, is_backward, panel_at)
            _multiply_rows(
                chunk * chunk_rows,
                min((chunk + 1) * chunk_rows, num_rows),
                panel_at,
                own_pairs,
                x_at + start * 4,
                x_stride,
                low_at,
                low_pairs,
                own_u_at,
                u_stride,
                start == 0,
                is_last,
                sums_at + (task - group) * chunk_rows * LINE_BYTES,
                scratch_at,
                residual_at + first * 2 if residual_at != 0 else 0,
                residual_stride,
                out_at + first * 2,
                out_stride,
                columns,
                weight_at + (first + columns) * weight_stride + start * 4,
                weight_stride,
                # Backward, where of many rows a few columns are next, asking gained nothing.
                0 if is_backward else PANEL_COLUMNS,
            )
