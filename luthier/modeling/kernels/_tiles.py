"""Products with weights that lie in matrix tiles, in the instructions for tiles or for pairs of bfloat16.

A tile is 16 rows of 64 bytes in a register of the processor's matrix unit (Intel AMX). A weight [O, K] lies
in panels of 64 outputs, [O/64, K/32, 4, 16, 16, 2]: of a panel and 32 inputs four tiles of 16 outputs, of a
tile 16 pairs of inputs, of a pair 16 outputs. So it is read from its begin to its end. A processor without a
matrix unit, but with products of pairs (AVX-512 BF16), reads the same order a line of 16 outputs at a time
(_few_rows.py, _pairs.py). All addresses are int64 and all strides bytes. LLVM makes these instructions only
where the processor has them.
"""

# What an intrinsic takes is in its arguments, which only the generated code reads.
# ruff: noqa: ARG001
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from luthier.modeling.kernels._features import HAS_UNIT
from luthier.modeling.kernels._few_rows import emit_few_rows
from luthier.modeling.kernels._machine import (
    I8,
    STEP_BYTES,
    TILE_BYTES,
    Machine,
)
from luthier.modeling.kernels._memory import I64, loop
from luthier.modeling.kernels._pairs import emit_rows
from luthier.modeling.kernels.shapes import PANEL_OUTPUTS, TILE_ROWS

# Sums of a panel: float32, for 16 rows [16, 64], for 32 rows and half its outputs [32, 32].
PANEL_SUMS = TILE_ROWS * PANEL_OUTPUTS

# Of what is asked for while a panel is multiplied; a panel with more steps asks for nothing.
MOST_ADDRESSES = 256

# Tiles of sums 0 to 3; of two blocks of rows 4 and 5; of weights 6 and 7.
_ROWS, _WEIGHTS = (4, 5), (6, 7)


@intrinsic
def sums_of_panel(_context):
    """Return the address of memory of the kernel's own: a panel's sums, then two shapes of tiles."""

    def generate(_target: Any, builder: Any, _signature: Any, _arguments: Any) -> Any:
        memory = cgutils.alloca_once(builder, ir.ArrayType(I8, PANEL_SUMS * 4 + 128))
        memory.align = 64
        return builder.ptrtoint(memory, I64)

    return types.int64(), generate


@intrinsic
def addresses_of_steps(_context):
    """Return the address of memory of the kernel's own: for `MOST_ADDRESSES` addresses."""

    def generate(_target: Any, builder: Any, _signature: Any, _arguments: Any) -> Any:
        return builder.ptrtoint(cgutils.alloca_once(builder, ir.ArrayType(I64, MOST_ADDRESSES)), I64)

    return types.int64(), generate


@intrinsic
def configure_tiles(_context, address):
    """Take the shapes of tiles, 64 bytes, from an address."""

    def generate(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        if HAS_UNIT:
            Machine(builder).configure(arguments[0])
        return I64(0)

    return types.int64(types.int64), generate


@intrinsic
def release_tiles(_context):
    """Leave the matrix unit as it was found."""

    def generate(_target: Any, builder: Any, _signature: Any, _arguments: Any) -> Any:
        if HAS_UNIT:
            Machine(builder).release()
        return I64(0)

    return types.int64(), generate


@intrinsic
def multiply_panel(_context, weights, x, stride, num_steps, num_rows, out, asked):
    """Write the products of up to 16 rows with the panel that begins at an address, float32 [rows, 64];
    steps are of 32 inputs.

    `asked` is as `emit_few_rows` takes it.
    """

    def generate(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        if not HAS_UNIT:
            emit_few_rows(builder, arguments)
            return I64(0)
        weights, x, stride, num_steps, _, out, _ = arguments
        machine = Machine(builder)
        for tile in range(4):
            machine.zero(tile)

        def step(index: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
            machine.load(_ROWS[0], builder.add(x, builder.mul(index, I64(64))), stride)
            place = builder.add(weights, builder.mul(index, I64(STEP_BYTES)))
            for tile in range(4):
                held = _WEIGHTS[tile % 2]
                machine.load(held, builder.add(place, I64(tile * TILE_BYTES)), I64(64))
                machine.multiply(tile, _ROWS[0], held)
            return []

        loop(builder, I64(0), num_steps, 1, [], step)
        for tile in range(4):
            machine.store(tile, builder.add(out, I64(tile * 64)), PANEL_OUTPUTS * 4)
        return I64(0)

    return types.int64(*[types.int64] * 7), generate


@intrinsic
def multiply_tile(_context, weights, x, stride, num_steps, num_rows, out):
    """Write the products of up to 16 rows with 16 outputs, float32 [rows, 16]; a tile for every step."""

    def generate(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        if not HAS_UNIT:
            widths = {"num_tiles": 1, "step_bytes": TILE_BYTES, "out_stride": 64}
            emit_rows(builder, arguments, **widths, sizes=(16, 4, 1))
            return I64(0)
        weights, x, stride, num_steps, _, out = arguments
        machine = Machine(builder)
        machine.zero(0)

        def step(index: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
            machine.load(_ROWS[0], builder.add(x, builder.mul(index, I64(64))), stride)
            machine.load(_WEIGHTS[0], builder.add(weights, builder.mul(index, I64(TILE_BYTES))), I64(64))
            machine.multiply(0, _ROWS[0], _WEIGHTS[0])
            return []

        loop(builder, I64(0), num_steps, 1, [], step)
        machine.store(0, out, 64)
        return I64(0)

    return types.int64(*[types.int64] * 6), generate


@intrinsic
def multiply_four_blocks(_context, weights, x, stride, num_steps, out):
    """Write the products of 64 rows with 16 outputs, float32 [64, 16]; a tile for every step."""

    def generate(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        weights, x, stride, num_steps, out = arguments
        if not HAS_UNIT:
            operands = (weights, x, stride, num_steps, I64(4 * TILE_ROWS), out)
            widths = {"num_tiles": 1, "step_bytes": TILE_BYTES, "out_stride": 64}
            emit_rows(builder, operands, **widths, sizes=(16,))
            return I64(0)
        machine = Machine(builder)
        starts = [builder.add(x, builder.mul(stride, I64(TILE_ROWS * tile))) for tile in range(4)]
        for tile in range(4):
            machine.zero(tile)

        def step(index: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
            machine.load(_WEIGHTS[0], builder.add(weights, builder.mul(index, I64(TILE_BYTES))), I64(64))
            for tile, start in enumerate(starts):
                held = _ROWS[tile % 2]
                machine.load(held, builder.add(start, builder.mul(index, I64(64))), stride)
                machine.multiply(tile, held, _WEIGHTS[0])
            return []

        loop(builder, I64(0), num_steps, 1, [], step)
        for tile in range(4):
            machine.store(tile, builder.add(out, I64(tile * TILE_BYTES)), 64)
        return I64(0)

    return types.int64(*[types.int64] * 5), generate


@intrinsic
def multiply_half_panel(_context, weights, x, stride, num_steps, num_rows, out):
    """Write the products of 17 to 32 rows with half of the panel that begins at an address, float32
    [rows, 32]; without a matrix unit of any number of rows up to that."""

    def generate(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        if not HAS_UNIT:
            widths = {"num_tiles": 2, "step_bytes": STEP_BYTES, "out_stride": 128}
            emit_rows(builder, arguments, **widths, sizes=(8, 4, 1))
            return I64(0)
        weights, x, stride, num_steps, _, out = arguments
        machine = Machine(builder)
        for tile in range(4):
            machine.zero(tile)
        below = builder.add(x, builder.mul(stride, I64(TILE_ROWS)))

        def step(index: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
            across = builder.mul(index, I64(64))
            place = builder.add(weights, builder.mul(index, I64(STEP_BYTES)))
            machine.load(_WEIGHTS[0], place, I64(64))
            machine.load(_ROWS[0], builder.add(x, across), stride)
            machine.load(_WEIGHTS[1], builder.add(place, I64(TILE_BYTES)), I64(64))
            machine.load(_ROWS[1], builder.add(below, across), stride)
            for tile in range(4):
                machine.multiply(tile, _ROWS[tile // 2], _WEIGHTS[tile % 2])
            return []

        loop(builder, I64(0), num_steps, 1, [], step)
        for tile in range(4):
            first = tile // 2 * TILE_ROWS * 128 + tile % 2 * 64
            machine.store(tile, builder.add(out, I64(first)), 128)
        return I64(0)

    return types.int64(*[types.int64] * 6), generate
