"""Products with weights that are stored in tiles, by products of pairs of bfloat16.

A weight [O, K] is stored in panels of 64 outputs, [O/64, K/32, 4, 16, 16, 2]: of a panel and 32 inputs four
tiles of 16 outputs, of a tile 16 pairs of inputs, of a pair 16 outputs. So it is read from beginning to end,
a line of 16 outputs at a time (bf16_gemv.py, bf16_gemm.py). All addresses are int64 and all strides bytes.
"""

# What an intrinsic takes is in its arguments, which only the generated code reads.
# ruff: noqa: ARG001
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from luthier_cpu.codegen.instructions import (
    I8,
    STEP_BYTES,
    TILE_BYTES,
)
from luthier_cpu.codegen.memory_access import I64
from luthier_cpu.gemm.bf16_gemm import emit_rows
from luthier_cpu.gemm.bf16_gemv import emit_few_rows
from luthier_cpu.gemm.tile_shapes import PANEL_OUTPUTS, TILE_ROWS

# Sums of a panel: float32, for 16 rows [16, 64], for 32 rows and half its outputs [32, 32].
PANEL_SUMS = TILE_ROWS * PANEL_OUTPUTS

# Of what is asked for while a panel is multiplied; a panel with more steps asks for nothing.
MOST_ADDRESSES = 256


@intrinsic
def sums_of_panel(_context):
    """Return the address of memory of the kernel's own for a panel's sums."""

    def generate(_target: Any, builder: Any, _signature: Any, _arguments: Any) -> Any:
        memory = cgutils.alloca_once(builder, ir.ArrayType(I8, PANEL_SUMS * 4))
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
def multiply_panel(_context, weights, x, stride, num_steps, num_rows, out, asked):
    """Write the products of up to 16 rows with the panel that begins at an address, float32 [rows, 64];
    steps are of 32 inputs.

    `asked` is as `emit_few_rows` takes it.
    """

    def generate(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        emit_few_rows(builder, arguments)
        return I64(0)

    return types.int64(*[types.int64] * 7), generate


@intrinsic
def multiply_tile(_context, weights, x, stride, num_steps, num_rows, out):
    """Write the products of up to 16 rows with 16 outputs, float32 [rows, 16]; a tile for every step."""

    def generate(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        widths = {"num_tiles": 1, "step_bytes": TILE_BYTES, "out_stride": 64}
        emit_rows(builder, arguments, **widths, sizes=(16, 4, 1))
        return I64(0)

    return types.int64(*[types.int64] * 6), generate


@intrinsic
def multiply_four_blocks(_context, weights, x, stride, num_steps, out):
    """Write the products of 64 rows with 16 outputs, float32 [64, 16]; a tile for every step."""

    def generate(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        weights, x, stride, num_steps, out = arguments
        operands = (weights, x, stride, num_steps, I64(4 * TILE_ROWS), out)
        widths = {"num_tiles": 1, "step_bytes": TILE_BYTES, "out_stride": 64}
        emit_rows(builder, operands, **widths, sizes=(16,))
        return I64(0)

    return types.int64(*[types.int64] * 5), generate


@intrinsic
def multiply_half_panel(_context, weights, x, stride, num_steps, num_rows, out):
    """Write the products of up to 32 rows with the half of a panel that begins at an address, float32
    [rows, 32]."""

    def generate(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        widths = {"num_tiles": 2, "step_bytes": STEP_BYTES, "out_stride": 128}
        emit_rows(builder, arguments, **widths, sizes=(8, 4, 1))
        return I64(0)

    return types.int64(*[types.int64] * 6), generate
