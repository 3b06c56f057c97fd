"""Products of pairs of bfloat16 (AVX-512 BF16), and what rounds and interleaves numbers for them.

A line of a tile is a pair of inputs for each of 16 outputs: one instruction multiplies it with the same pair
of a row and adds to 16 sums. All addresses are int64 and all strides bytes.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from typing import Any

from llvmlite import ir

from luthier_cpu.codegen.instructions import BITS, LINE_BYTES, STEP_BYTES, SUMS, TILE_BYTES, Machine
from luthier_cpu.codegen.memory_access import (
    HALVES,
    I64,
    LANES,
    Body,
    emitted,
    loop,
    rounded_bits,
    to_bfloat16,
)

# How many steps' weights, of 32 inputs each, are taken at a time, and how many before their use they are
# asked for while several blocks of rows pass by.
_STEPS_TOGETHER = 4


def _emit_rows(
    builder: ir.IRBuilder,
    operands: tuple[ir.Value, ...],
    *,
    num_tiles: int,
    step_bytes: int,
    out_stride: int,
    sizes: tuple[int, ...],
) -> None:
    """Emit the products of rows with some tiles of outputs, as float32.

    Some steps' weights are taken at a time and stay near the processor while all rows pass by. Meanwhile
    memory is asked for those of the next, a part by each block of rows, so that neither waits for the other.

    Args:
        operands: the weights' address, the rows' and their stride, the steps of 32 inputs, the number of
            rows, and where the products go.
        num_tiles: tiles of 16 outputs side by side.
        step_bytes: from the weights of one step to those of the next.
        out_stride: from the products of one row to those of the next.
        sizes: how many rows are multiplied together, the last 1 unless their number is known; their sums
            must find room in registers.
    """
    weights, x, stride, num_steps, num_rows, out = operands
    machine = Machine(builder)
    zeros = [ir.Constant(SUMS, [0.0] * LANES)] * num_tiles

    def target_of(row: ir.Value, which: int, tile: int) -> ir.Value:
        place = builder.add(builder.mul(row, I64(out_stride)), I64(which * out_stride + tile * 64))
        return machine.pointer(builder.add(out, place), SUMS)

    def clear(row: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
        for tile, zero in enumerate(zeros):
            builder.store(zero, target_of(row, 0, tile), align=4)
        return []

    def some_steps(begin: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
        end = builder.add(begin, I64(_STEPS_TOGETHER))
        end = builder.select(builder.icmp_signed("<", end, num_steps), end, num_steps)

        def together(size: int) -> Body:
            def body(row: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
                first = builder.add(x, builder.mul(row, stride))
                starts = [
                    machine.opaque(builder.add(first, builder.mul(stride, I64(number))))
                    for number in range(size)
                ]
                ahead = _places_ahead(builder, row, num_rows, sizes[0], num_tiles, step_bytes)

                def step(index: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
                    place = builder.add(weights, builder.mul(index, I64(step_bytes)))
                    tiles = [builder.add(place, I64(tile * TILE_BYTES)) for tile in range(num_tiles)]
                    inputs = [builder.add(start, builder.mul(index, I64(64))) for start in starts]
                    places_ahead = [builder.add(place, distance) for distance in ahead]
                    return emit_lines(builder, tiles, inputs, places_ahead, sums)

                places = [target_of(row, which, tile) for which in range(size) for tile in range(num_tiles)]
                before = [builder.load(one, align=4) for one in places]
                _, sums = loop(builder, begin, end, 1, before, step)
                for one, total in zip(places, sums, strict=True):
                    builder.store(total, one, align=4)
                return []

            return body

        row: ir.Value = I64(0)
        for size in sizes:
            row, _ = loop(builder, row, num_rows, size, [], together(size))
        return []

    loop(builder, I64(0), num_rows, 1, [], clear)
    last = builder.add(num_steps, I64(_STEPS_TOGETHER - 1))
    loop(builder, I64(0), last, _STEPS_TOGETHER, [], some_steps)


def _rows_product(num_tiles: int, step_bytes: int, sizes: tuple[int, ...]) -> Any:
    @emitted()
    def multiply(builder, weights, x, stride, num_steps, num_rows, out):
        widths = {"num_tiles": num_tiles, "step_bytes": step_bytes, "out_stride": 64 * num_tiles}
        _emit_rows(builder, (weights, x, stride, num_steps, num_rows, out), **widths, sizes=sizes)

    return multiply


# Write the products of rows with 16 outputs, float32 [rows, 16], a tile for every step: of any rows, and of a
# multiple of 16.
multiply_tile, multiply_tile_16_rows = (_rows_product(1, TILE_BYTES, sizes) for sizes in ((16, 4, 1), (16,)))
# Write the products of rows with the half of a panel that begins at an address, float32 [rows, 32].
multiply_half_panel = _rows_product(2, STEP_BYTES, (8, 4, 1))


def emit_lines(
    builder: ir.IRBuilder,
    tiles: list[ir.Value],
    inputs: list[ir.Value],
    ahead: list[ir.Value],
    sums: list[ir.Value],
    *,
    beside: ir.Value | None = None,
) -> list[ir.Value]:
    """Emit the products of 32 inputs of some rows with tiles; the sums come tile by tile of each row.

    Meanwhile a tile's weights are asked for from each of `ahead` on, and 16 lines from `beside` on.
    """
    machine = Machine(builder)
    for number in range(LANES):
        weights = [machine.line(tile, number) for tile in tiles]
        for place in ahead:
            machine.prefetch_behind(builder.add(place, I64(LINE_BYTES * number)))
        if beside is not None:
            machine.prefetch_behind(builder.add(beside, I64(LINE_BYTES * number)))
        sums = machine.multiply_line(sums, inputs, 4 * number, weights)
    return sums


def _places_ahead(
    builder: ir.IRBuilder,
    row: ir.Value,
    num_rows: ir.Value,
    size: int,
    num_tiles: int,
    step_bytes: int,
) -> list[ir.Value]:
    """Return how far behind a line the lines are that a block of rows prefetches: its share of later steps.

    A block that is alone passes so fast that it prefetches one step alone: memory takes few requests at once.
    One of several prefetches its tiles more than once, which costs less than to branch.
    """
    blocks = builder.udiv(builder.add(num_rows, I64(size - 1)), I64(size))
    block = builder.udiv(row, I64(size))
    first, after = (
        builder.udiv(builder.mul(number, I64(num_tiles)), blocks)
        for number in (block, builder.add(block, I64(1)))
    )
    last = builder.sub(after, I64(1))
    last = builder.select(builder.icmp_signed("<", last, first), first, last)
    is_alone = builder.icmp_signed("==", blocks, I64(1))
    distance = builder.select(is_alone, I64(step_bytes), I64(_STEPS_TOGETHER * step_bytes))
    places = []
    for tile in range(num_tiles):
        own = builder.add(first, I64(tile))
        own = builder.select(builder.icmp_signed("<", own, last), own, last)
        places.append(builder.add(distance, builder.mul(own, I64(TILE_BYTES))))
    return places


def paired_bits(builder: ir.IRBuilder, even: ir.Value, odd: ir.Value) -> ir.Value:
    """Return the bits of two vectors of 16 float32 as 16 pairs of bfloat16."""
    even, odd = (rounded_bits(builder, builder.bitcast(one, BITS)) for one in (even, odd))
    low = builder.lshr(even, ir.Constant(BITS, [16] * LANES))
    return builder.or_(low, builder.and_(odd, ir.Constant(BITS, [-65536] * LANES)))


@emitted()
def interleave(builder, even, odd, target):
    """Write two rows of 16 bfloat16 as one row of 16 pairs."""
    machine = Machine(builder)
    low, high = (
        builder.zext(builder.load(machine.pointer(place, HALVES), align=2), BITS) for place in (even, odd)
    )
    pairs = builder.or_(low, builder.shl(high, ir.Constant(BITS, [16] * LANES)))
    builder.store(pairs, machine.pointer(target, BITS), align=4)


@emitted()
def round_lanes(builder, source, target):
    """Write 16 float32 as the nearest bfloat16, of two equally near ones the even."""
    machine = Machine(builder)
    floats = builder.load(machine.pointer(source, SUMS), align=4)
    builder.store(to_bfloat16(builder, floats), machine.pointer(target, HALVES), align=2)
