"""Products of few rows with a panel of 64 outputs, by pairs of bfloat16, as fast as memory gives the panel.

A panel is read once a step. What a processor foresees is memory that is read in order, so weights are used,
and prefetched, a line after the other as they are stored; rows and sums, which stay near, are read again. All
addresses are int64 and all strides bytes.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from typing import Any

from llvmlite import ir
from numba.core import cgutils

from luthier_cpu.codegen.instructions import I8, LINE_BYTES, STEP_BYTES, SUMS, TILE_BYTES, Machine
from luthier_cpu.codegen.memory_access import I64, LANES, Body, emitted, loop
from luthier_cpu.gemm.bf16_gemm import emit_lines
from luthier_cpu.gemm.tile_shapes import MOST_ROWS, PANEL_OUTPUTS, TILE_ROWS

_SIZES = (MOST_ROWS, 4, 2, 1)
_OUT_BYTES = PANEL_OUTPUTS * 4
_TILES_OF_PANEL = STEP_BYTES // TILE_BYTES
# Steps of 32 inputs whose weights stay near while more than `MOST_ROWS` pass by; the next are asked for.
STEPS_TOGETHER = 3
_ZERO = ir.Constant(SUMS, [0.0] * LANES)
# Sums of a panel: float32, for 16 rows [16, 64], for 32 rows and half its outputs [32, 32].
PANEL_SUMS = TILE_ROWS * PANEL_OUTPUTS

# Of what is asked for while a panel is multiplied; a panel with more steps asks for nothing.
MOST_ADDRESSES = 256


@emitted()
def sums_of_panel(
    builder,
):
    """Return the address of memory of the kernel's own for a panel's sums."""
    memory = cgutils.alloca_once(builder, ir.ArrayType(I8, PANEL_SUMS * 4))
    memory.align = 64
    return builder.ptrtoint(memory, I64)


@emitted()
def addresses_of_steps(
    builder,
):
    """Return the address of memory of the kernel's own: for `MOST_ADDRESSES` addresses."""
    return builder.ptrtoint(cgutils.alloca_once(builder, ir.ArrayType(I64, MOST_ADDRESSES)), I64)


@emitted()
def multiply_panel(builder, weights, x, stride, num_steps, num_rows, out, asked):
    """Write the products of up to 16 rows with the panel that begins at an address, float32 [rows, 64].

    Up to eight rows take as long as memory, and their weights are read a tile after the other. More take as
    long as their products: two tiles at a time, whose weights serve twice as often, and some steps at a time,
    between which sums stay in registers.

    A step is of 32 inputs. `asked` is the address of other addresses, 0 for none: of more than eight rows,
    what begins there, `STEPS_TOGETHER` times `STEP_BYTES`, is prefetched during as many steps.
    """
    products = [weights, x, stride, num_steps, num_rows, out]
    machine = Machine(builder)

    def clear(row: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
        for tile in range(_TILES_OF_PANEL):
            place = builder.add(out, builder.add(builder.mul(row, I64(_OUT_BYTES)), I64(64 * tile)))
            builder.store(_ZERO, machine.pointer(place, SUMS), align=4)
        return []

    loop(builder, I64(0), num_rows, 1, [], clear)
    with builder.if_else(builder.icmp_signed(">", num_rows, I64(MOST_ROWS))) as (many, few):
        with many, builder.if_else(builder.icmp_signed("!=", asked, I64(0))) as (asking, others):
            with asking:
                _emit_steps(builder, products, num_tiles=2, num_together=STEPS_TOGETHER, asked=asked)
            with others:
                _emit_steps(builder, products, num_tiles=2, num_together=STEPS_TOGETHER)
        with few:
            _emit_steps(builder, products, num_tiles=1, num_together=1)


def _emit_steps(
    builder: ir.IRBuilder,
    operands: list[ir.Value],
    *,
    num_tiles: int,
    num_together: int,
    asked: ir.Value | None = None,
) -> None:
    """Emit all products: some steps, and of these some tiles, with all rows before the next.

    `asked` is as `multiply_panel` takes it, None for none.
    """
    weights, x, stride, num_steps, num_rows, out = operands
    machine = Machine(builder)

    def some_steps(begin: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
        end = builder.add(begin, I64(num_together))
        end = builder.select(builder.icmp_signed("<", end, num_steps), end, num_steps)
        other: ir.Value | None = None
        if asked is not None:
            place = builder.mul(builder.udiv(begin, I64(num_together)), I64(8))
            other = builder.load(machine.pointer(builder.add(asked, place), I64), align=8)

        def some_tiles(tile: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
            places = (weights, x, stride, out, tile, begin, end)
            row: ir.Value = I64(0)
            for size in _SIZES:
                body = _block(builder, size, num_tiles, places, other)
                row, _ = loop(builder, row, num_rows, size, [], body)
            return []

        loop(builder, I64(0), I64(_TILES_OF_PANEL), num_tiles, [], some_tiles)
        return []

    last = builder.add(num_steps, I64(num_together - 1))
    loop(builder, I64(0), last, num_together, [], some_steps)


def _block(
    builder: ir.IRBuilder,
    size: int,
    num_tiles: int,
    places: tuple[ir.Value, ...],
    other: ir.Value | None,
) -> Body:
    """Return what adds the products of a block of rows with some tiles of some steps to their sums.

    `other` is where something else begins that is asked for.
    """
    weights, x, stride, out, tile, begin, end = places
    machine = Machine(builder)

    def body(row: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
        firsts = [
            machine.opaque(builder.add(x, builder.mul(stride, builder.add(row, I64(number)))))
            for number in range(size)
        ]
        own = builder.add(out, builder.add(builder.mul(row, I64(_OUT_BYTES)), builder.mul(tile, I64(64))))
        held = [
            machine.pointer(builder.add(own, I64(number * _OUT_BYTES + 64 * which)), SUMS)
            for number in range(size)
            for which in range(num_tiles)
        ]
        # Of more than `MOST_ROWS`, the blocks and steps that pass before the next weights are wanted ask for
        # these in turn, in the order of memory.
        turn = builder.add(tile, builder.udiv(row, I64(MOST_ROWS)))

        def step(index: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
            place = builder.add(weights, builder.mul(index, I64(STEP_BYTES)))
            place = builder.add(place, builder.mul(tile, I64(TILE_BYTES)))
            across = builder.mul(index, I64(64))
            inputs = [builder.add(first, across) for first in firsts]
            beside = None
            if num_tiles == 1:
                ahead = builder.add(place, I64(STEP_BYTES))
            else:
                number = builder.add(builder.mul(turn, builder.sub(end, begin)), builder.sub(index, begin))
                ahead = builder.add(weights, builder.mul(end, I64(STEP_BYTES)))
                ahead = builder.add(ahead, builder.mul(number, I64(TILE_BYTES)))
                if other is not None:
                    beside = builder.add(other, builder.mul(number, I64(TILE_BYTES)))
            tiles = [builder.add(place, I64(which * TILE_BYTES)) for which in range(num_tiles)]
            return emit_lines(builder, tiles, inputs, [ahead], sums, beside=beside)

        before = [builder.load(one, align=4) for one in held]
        _, sums = loop(builder, begin, end, 1, before, step)
        for one, total in zip(held, sums, strict=True):
            builder.store(total, one, align=4)
        return []

    return body


def _row_product(num_tiles: int) -> Any:
    """Return an intrinsic that multiplies one row with the first tiles of every step of a panel.

    Sums are the same for any number of tiles, and so however panels are shared out.
    """

    @emitted()
    def multiply(builder, weights, x, num_steps, out):
        machine = Machine(builder)

        def step(index: ir.Value, held: list[ir.Value]) -> list[ir.Value]:
            sums = list(held)
            place = builder.add(weights, builder.mul(index, I64(STEP_BYTES)))
            inputs = builder.add(x, builder.mul(index, I64(64)))
            for tile in range(num_tiles):
                begin = builder.add(place, I64(tile * TILE_BYTES))
                for number in range(LANES):
                    weight = machine.line(begin, number)
                    machine.prefetch_behind(builder.add(begin, I64(STEP_BYTES + LINE_BYTES * number)))
                    pair = machine.repeated(builder.add(inputs, I64(4 * number)))
                    # Two sums a tile, so that one needn't wait for the other.
                    own = 2 * tile + number % 2
                    sums[own] = machine.multiply_pairs(sums[own], pair, weight)
            return sums

        _, sums = loop(builder, I64(0), num_steps, 1, [_ZERO] * (2 * num_tiles), step)
        for tile in range(num_tiles):
            total = builder.fadd(sums[2 * tile], sums[2 * tile + 1])
            place = machine.pointer(builder.add(out, I64(64 * tile)), SUMS)
            builder.store(total, place, align=4)

    return multiply


# Write the products of one row with the panel, or the half of one, that begins at an address: 64 float32, or
# 32.
multiply_row, multiply_half_row = _row_product(_TILES_OF_PANEL), _row_product(_TILES_OF_PANEL // 2)
