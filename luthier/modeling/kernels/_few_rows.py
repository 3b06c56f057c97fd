"""Products of few rows with a panel of 64 outputs, by pairs of bfloat16, as fast as memory gives the panel.

A panel is read once a step. What a processor foresees is memory that is read in order, so weights are used,
and asked for, a line after the other as they lie; rows and sums, which stay near, are what is gone through
again. All addresses are int64 and all strides bytes.
"""

# What an intrinsic takes is in its arguments, which only the generated code reads.
# ruff: noqa: ARG001
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from luthier.modeling.kernels._machine import BITS, STEP_BYTES, SUMS, TILE_BYTES, Machine
from luthier.modeling.kernels._memory import I64, LANES, Body, loop
from luthier.modeling.kernels.products import PANEL_OUTPUTS

# Rows that are multiplied together: their sums for two tiles of 16 outputs, and the weights of these, must
# find room in 32 registers.
_MOST_ROWS = 8
_SIZES = (_MOST_ROWS, 4, 2, 1)
_OUT_BYTES = PANEL_OUTPUTS * 4
_TILES_OF_PANEL = STEP_BYTES // TILE_BYTES
# How far ahead of its use a weight is asked for: the next 32 inputs' are.
_AHEAD = STEP_BYTES
_ZERO = ir.Constant(SUMS, [0.0] * LANES)


def emit_few_rows(builder: ir.IRBuilder, operands: tuple[ir.Value, ...]) -> None:
    """Emit the products of up to 16 rows with a panel, as float32 [rows, 64].

    Up to eight rows take as long as memory, and their weights are read a tile after the other. More take as
    long as their products: two tiles at a time, whose weights serve twice as often.

    Args:
        builder: where the code goes.
        operands: the weights' address, the rows' and their stride, the steps of 32 inputs, the number of
            rows, and where the products go.
    """
    num_rows, out = operands[4:]
    machine = Machine(builder)

    def clear(row: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
        for tile in range(_TILES_OF_PANEL):
            place = builder.add(out, builder.add(builder.mul(row, I64(_OUT_BYTES)), I64(64 * tile)))
            builder.store(_ZERO, machine.pointer(place, SUMS), align=4)
        return []

    loop(builder, I64(0), num_rows, 1, [], clear)
    with builder.if_else(builder.icmp_signed(">", num_rows, I64(_MOST_ROWS))) as (many, few):
        with many:
            _emit_steps(builder, operands, num_tiles=2)
        with few:
            _emit_steps(builder, operands, num_tiles=1)


def _emit_steps(builder: ir.IRBuilder, operands: tuple[ir.Value, ...], *, num_tiles: int) -> None:
    """Emit all products, some tiles at a time with all rows, before the next; sums are kept in memory."""
    weights, x, stride, num_steps, num_rows, out = operands

    def step(index: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
        of_step = builder.add(weights, builder.mul(index, I64(STEP_BYTES)))
        inputs = builder.add(x, builder.mul(index, I64(64)))

        def some_tiles(tile: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
            place = builder.add(of_step, builder.mul(tile, I64(TILE_BYTES)))
            target = builder.add(out, builder.mul(tile, I64(64)))
            row: ir.Value = I64(0)
            for size in _SIZES:
                body = _block(builder, size, num_tiles, (place, inputs, stride, target))
                row, _ = loop(builder, row, num_rows, size, [], body)
            return []

        loop(builder, I64(0), I64(_TILES_OF_PANEL), num_tiles, [], some_tiles)
        return []

    loop(builder, I64(0), num_steps, 1, [], step)


def _block(builder: ir.IRBuilder, size: int, num_tiles: int, places: tuple[ir.Value, ...]) -> Body:
    """Return what multiplies a block of rows with some tiles; of what comes next it asks for one."""
    place, inputs, stride, target = places
    machine = Machine(builder)

    def body(row: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
        own = builder.add(target, builder.mul(row, I64(_OUT_BYTES)))
        firsts = [
            machine.opaque(builder.add(inputs, builder.mul(stride, builder.add(row, I64(number)))))
            for number in range(size)
        ]
        of_block = builder.mul(builder.udiv(row, I64(_MOST_ROWS)), I64(TILE_BYTES))
        ahead = builder.add(builder.add(place, I64(_AHEAD)), of_block)
        held = [
            machine.pointer(builder.add(own, I64(number * _OUT_BYTES + 64 * tile)), SUMS)
            for number in range(size)
            for tile in range(num_tiles)
        ]
        sums = [builder.load(one, align=4) for one in held]
        for line in range(LANES):
            machine.prefetch_here(builder.add(ahead, I64(64 * line)))
            lines = [builder.add(place, I64(64 * line + tile * TILE_BYTES)) for tile in range(num_tiles)]
            weights = [builder.load(machine.pointer(one, BITS), align=4) for one in lines]
            for number, first in enumerate(firsts):
                pair = machine.repeated(builder.add(first, I64(4 * line)))
                for tile, weight in enumerate(weights):
                    which = number * num_tiles + tile
                    sums[which] = machine.multiply_pairs(sums[which], pair, weight)
        for one, total in zip(held, sums, strict=True):
            builder.store(total, one, align=4)
        return []

    return body


@intrinsic
def multiply_row(_context, weights, x, num_steps, out):
    """Write the products of one row with a panel, 64 float32."""

    def generate(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        weights, x, num_steps, out = arguments
        machine = Machine(builder)

        def step(index: ir.Value, held: list[ir.Value]) -> list[ir.Value]:
            sums = list(held)
            place = builder.add(weights, builder.mul(index, I64(STEP_BYTES)))
            inputs = builder.add(x, builder.mul(index, I64(64)))
            for tile in range(_TILES_OF_PANEL):
                for number in range(LANES):
                    line = builder.add(place, I64(tile * TILE_BYTES + 64 * number))
                    machine.prefetch_here(builder.add(line, I64(_AHEAD)))
                    weight = builder.load(machine.pointer(line, BITS), align=4)
                    pair = machine.repeated(builder.add(inputs, I64(4 * number)))
                    # Two sums a tile, so that one needn't wait for the other.
                    own = 2 * tile + number % 2
                    sums[own] = machine.multiply_pairs(sums[own], pair, weight)
            return sums

        _, sums = loop(builder, I64(0), num_steps, 1, [_ZERO] * (2 * _TILES_OF_PANEL), step)
        for tile in range(_TILES_OF_PANEL):
            total = builder.fadd(sums[2 * tile], sums[2 * tile + 1])
            place = machine.pointer(builder.add(out, I64(64 * tile)), SUMS)
            builder.store(total, place, align=4)
        return I64(0)

    return types.int64(*[types.int64] * 4), generate
