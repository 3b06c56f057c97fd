"""Blocks of products of pairs of bfloat16 whose sums stay in registers, and what lays panels for them.

A panel holds up to 48 columns of a factor, or 64: for every pair of numbers that are summed over a line of
pairs, 16 columns in each 64 bytes. A block is some rows of the other factor times a panel. All addresses are
int64 and all strides bytes.

Legend: T tiles of 16 columns.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from typing import Any

from llvmlite import ir

from luthier_cpu.codegen.instructions import BITS, LINE_BYTES, SUMS, Machine
from luthier_cpu.codegen.memory_access import (
    HALVES,
    I32,
    I64,
    LANES,
    Memory,
    constant,
    emitted,
    lanes_below,
    loop,
    number_of_bits,
    rounded_bits,
    row_starts,
    transposed,
)


def _emit_sums(
    builder: ir.IRBuilder,
    num_rows: int,
    num_tiles: int,
    panels: tuple[tuple[ir.Value, ...], ...],
    before: ir.Value,
    before_stride: ir.Value,
) -> list[ir.Value]:
    """Emit the sums of a block over panels, row by row of each tile.

    Args:
        num_tiles: T; their sums and a line must find room in registers.
        panels: of each its address, its pairs, the rows' address, their stride and that of their pairs.
        before: the address of the sums so far, float32.

    Returns:
        The sums, vectors of 16 float32.
    """
    machine = Machine(builder)
    sums = []
    for row in range(num_rows):
        first = builder.add(before, builder.mul(before_stride, I64(row)))
        for tile in range(num_tiles):
            place = machine.pointer(builder.add(first, I64(LINE_BYTES * tile)), SUMS)
            sums.append(builder.load(place, align=4))
    for panel, num_pairs, x, row_stride, pair_stride in panels:
        starts = [builder.add(x, builder.mul(row_stride, I64(row))) for row in range(num_rows)]

        def step(
            index: ir.Value,
            held: list[ir.Value],
            panel: ir.Value = panel,
            pair_stride: ir.Value = pair_stride,
            starts: list[ir.Value] = starts,
        ) -> list[ir.Value]:
            held = list(held)
            line = builder.add(panel, builder.mul(index, I64(LINE_BYTES * num_tiles)))
            offset = builder.mul(index, pair_stride)
            columns = [
                builder.load(
                    machine.pointer(builder.add(line, I64(LINE_BYTES * tile)), BITS), align=LINE_BYTES
                )
                for tile in range(num_tiles)
            ]
            for row, start in enumerate(starts):
                pair = machine.repeated(builder.add(start, offset))
                for tile, column in enumerate(columns):
                    own = row * num_tiles + tile
                    held[own] = machine.multiply_pairs(held[own], pair, column)
            return held

        _, sums = loop(builder, I64(0), num_pairs, 1, sums, step)
    return sums


def _finished_block(num_rows: int, num_tiles: int) -> Any:
    """Return the intrinsic of a block that rounds its sums into the result."""

    @emitted()
    def finish(
        builder,
        panel,
        pairs,
        x,
        row_stride,
        pair_stride,
        low_panel,
        low_pairs,
        low,
        low_stride,
        low_pair_stride,
        before,
        before_stride,
        out,
        out_stride,
        residual,
        residual_stride,
        num_columns,
    ):
        own = (panel, pairs, x, row_stride, pair_stride)
        low_rank = (low_panel, low_pairs, low, low_stride, low_pair_stride)
        sums = _emit_sums(builder, num_rows, num_tiles, (own, low_rank), before, before_stride)
        memory = Memory(builder, is_bfloat16=True)
        masks = [lanes_below(builder, num_columns, tile * LANES) for tile in range(num_tiles)]
        for row in range(num_rows):
            target = builder.add(out, builder.mul(out_stride, I64(row)))
            added = builder.add(residual, builder.mul(residual_stride, I64(row)))
            for tile, mask in enumerate(masks):
                first = I64(tile * LANES)
                total = sums[row * num_tiles + tile]
                total = builder.fadd(total, memory.load_some(added, first, mask))
                memory.store_some(total, target, first, mask)

    return finish


def _kept_block(num_rows: int, num_tiles: int) -> Any:
    """Return the intrinsic of a block that keeps its sums, float32."""

    @emitted()
    def keep(builder, panel, pairs, x, row_stride, pair_stride, before, before_stride, out, out_stride):
        own = (panel, pairs, x, row_stride, pair_stride)
        sums = _emit_sums(builder, num_rows, num_tiles, (own,), before, before_stride)
        memory = Memory(builder, is_bfloat16=False)
        for row in range(num_rows):
            target = builder.add(out, builder.mul(out_stride, I64(row)))
            for tile in range(num_tiles):
                memory.store(sums[row * num_tiles + tile], target, I64(tile * LANES))

    return keep


finish_8_rows, keep_8_rows = _finished_block(8, 3), _kept_block(8, 3)
finish_1_row, keep_1_row = _finished_block(1, 3), _kept_block(1, 3)
finish_16_rows_of_tile, finish_1_row_of_tile = _finished_block(16, 1), _finished_block(1, 1)
finish_6_rows_of_64, finish_1_row_of_64 = _finished_block(6, 4), _finished_block(1, 4)


@emitted()
def pack_pairs(builder, source, stride, num_rows, target, target_stride):
    """Write 32 bfloat16 of up to 16 rows as 16 lines of pairs, a row a column; further columns repeat the
    last row."""
    machine = Machine(builder)
    starts = row_starts(builder, source, stride, num_rows)
    rows = [builder.load(machine.pointer(start, BITS), align=2) for start in starts]
    for number, line in enumerate(transposed(builder, rows)):
        place = builder.add(target, builder.mul(target_stride, I64(number)))
        builder.store(line, machine.pointer(place, BITS), align=LINE_BYTES)


def _rounded_halves(builder: ir.IRBuilder, floats: ir.Value) -> ir.Value:
    """Return 16 float32 as 16 bfloat16's bits in the lower halves of int32."""
    return builder.lshr(rounded_bits(builder, builder.bitcast(floats, BITS)), constant(BITS, 16))


@emitted()
def pack_scaled_pairs(builder, source, stride, num_rows, num_numbers, scale, target, target_stride):
    """Write the first 32 float32 of up to 16 rows, times a scale, as `pack_pairs` does.

    The scale goes as the bits of a float32. Numbers that there are not are zeros.
    """
    machine, memory = Machine(builder), Memory(builder, is_bfloat16=False)
    factor = number_of_bits(builder, scale)
    rows = []
    for start in row_starts(builder, source, stride, num_rows):
        parts = []
        for first in (0, LANES):
            mask = lanes_below(builder, num_numbers, first)
            floats = builder.fmul(memory.load_some(start, I64(first), mask), factor)
            parts.append(builder.trunc(_rounded_halves(builder, floats), HALVES))
        order = ir.Constant(ir.VectorType(I32, 2 * LANES), list(range(2 * LANES)))
        rows.append(builder.bitcast(builder.shuffle_vector(parts[0], parts[1], order), BITS))
    for number, line in enumerate(transposed(builder, rows)):
        place = builder.add(target, builder.mul(target_stride, I64(number)))
        builder.store(line, machine.pointer(place, BITS), align=LINE_BYTES)


def _pairing(num_tiles: int) -> Any:
    """Return the intrinsic that pairs two rows as lines of 16 pairs."""

    @emitted()
    def pair(builder, even, odd, num_columns, has_odd, target):
        machine, memory = Machine(builder), Memory(builder, is_bfloat16=True)
        num_odd = builder.select(builder.icmp_signed("!=", has_odd, I64(0)), num_columns, I64(0))
        for tile in range(num_tiles):
            first = tile * LANES
            low = memory.load_some(even, I64(first), lanes_below(builder, num_columns, first))
            high = memory.load_some(odd, I64(first), lanes_below(builder, num_odd, first))
            # Widened they are their own upper halves.
            low = builder.lshr(builder.bitcast(low, BITS), constant(BITS, 16))
            line = builder.or_(low, builder.bitcast(high, BITS))
            place = machine.pointer(builder.add(target, I64(LINE_BYTES * tile)), BITS)
            builder.store(line, place, align=4)

    return pair


# Write up to 48 (64) bfloat16 of two rows as three (four) lines of pairs; what there is not are zeros.
pair_lines, pair_lines_of_64 = _pairing(3), _pairing(4)


@emitted()
def pair_scaled_line(builder, even, odd, num_columns, has_odd, scale, target):
    """Write up to 16 float32 of two rows, times a scale (the bits of a float32), as a line of pairs of
    bfloat16; what there is not are zeros."""
    machine, memory = Machine(builder), Memory(builder, is_bfloat16=False)
    factor = number_of_bits(builder, scale)
    num_odd = builder.select(builder.icmp_signed("!=", has_odd, I64(0)), num_columns, I64(0))
    low, high = (
        _rounded_halves(
            builder,
            builder.fmul(memory.load_some(row, I64(0), lanes_below(builder, count)), factor),
        )
        for row, count in ((even, num_columns), (odd, num_odd))
    )
    line = builder.or_(low, builder.shl(high, constant(BITS, 16)))
    builder.store(line, machine.pointer(target, BITS), align=4)
