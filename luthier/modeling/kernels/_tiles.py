"""Products with weights that lie in matrix tiles, in the instructions for tiles and for pairs of bfloat16.

A tile is 16 rows of 64 bytes in a register of the processor's matrix unit (Intel AMX). A weight [O, K] lies
in panels of 64 outputs, [O/64, K/32, 4, 16, 16, 2]: of a panel and 32 inputs four tiles of 16 outputs, of a
tile 16 pairs of inputs, of a pair 16 outputs. So it is read from its begin to its end. All addresses are
int64 and all strides bytes. LLVM makes these instructions only where the processor has them.
"""

# What an intrinsic takes is in its arguments, which only the generated code reads.
# ruff: noqa: ARG001
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from luthier.modeling.kernels._language import has_feature
from luthier.modeling.kernels._memory import loop, sum_lanes
from luthier.modeling.kernels.products import PANEL_OUTPUTS

_VOID, _I64, _I32, _I16, _I8 = ir.VoidType(), ir.IntType(64), ir.IntType(32), ir.IntType(16), ir.IntType(8)
_BYTES = _I8.as_pointer()
_LANES = 16
_SUMS = ir.VectorType(ir.FloatType(), _LANES)
_BITS, _HALVES = ir.VectorType(_I32, _LANES), ir.VectorType(_I16, _LANES)

# Whether products of pairs can be made here; tiles need more (products.py).
HAS_PAIRS = has_feature("avx512bf16")
TILE_ROWS = 16
# Sums of a panel: float32, for 16 rows [16, 64], for 32 rows and half its outputs [32, 32].
PANEL_SUMS = TILE_ROWS * PANEL_OUTPUTS
_TILE_BYTES = 1024
_STEP_BYTES = 4 * _TILE_BYTES
# How far ahead of its use a single row's weight is asked for; measured.
_AHEAD = 4096
_AHEAD_OF_ROWS = 2048

# Tiles of sums 0 to 3; of two blocks of rows 4 and 5; of weights 6 and 7.
_ROWS, _WEIGHTS = (4, 5), (6, 7)


class _BFloat16(ir.Type):
    """LLVM's bfloat, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"


_PAIRS = ir.VectorType(_BFloat16(), 2 * _LANES)


class _Machine:
    """Emits the processor's own instructions.

    Args:
        builder: where the code goes.
    """

    def __init__(self, builder: ir.IRBuilder) -> None:
        self._builder = builder

    def _call(self, name: str, kind: ir.Type, *arguments: ir.Value) -> ir.Value:
        takes = ir.FunctionType(kind, [one.type for one in arguments])
        function = self._builder.module.globals.get(name)
        if function is None:
            function = ir.Function(self._builder.module, takes, name=name)
        return self._builder.call(function, arguments)

    def pointer(self, address: ir.Value, held: ir.Type = _I8) -> ir.Value:
        return self._builder.inttoptr(address, held.as_pointer())

    def configure(self, address: ir.Value) -> None:
        self._call("llvm.x86.ldtilecfg", _VOID, self.pointer(address))

    def release(self) -> None:
        self._call("llvm.x86.tilerelease", _VOID)

    def zero(self, tile: int) -> None:
        self._call("llvm.x86.tilezero", _VOID, _I8(tile))

    def load(self, tile: int, address: ir.Value, stride: ir.Value) -> None:
        self._call("llvm.x86.tileloadd64", _VOID, _I8(tile), self.pointer(address), stride)

    def store(self, tile: int, address: ir.Value, stride: int) -> None:
        self._call("llvm.x86.tilestored64", _VOID, _I8(tile), self.pointer(address), _I64(stride))

    def multiply(self, sums: int, rows: int, weights: int) -> None:
        self._call("llvm.x86.tdpbf16ps", _VOID, _I8(sums), _I8(rows), _I8(weights))

    def multiply_pairs(self, sums: ir.Value, weights: ir.Value, pair: ir.Value) -> ir.Value:
        weights, pair = (self._builder.bitcast(one, _PAIRS) for one in (weights, pair))
        return self._call("llvm.x86.avx512bf16.dpbf16ps.512", _SUMS, sums, weights, pair)

    def rounded(self, bits: ir.Value) -> ir.Value:
        """Return the bits of 16 float32 with those of the nearest bfloat16 in their upper halves."""
        builder = self._builder
        sixteen, one, half = (ir.Constant(_BITS, [value] * _LANES) for value in (16, 1, 0x7FFF))
        odd = builder.and_(builder.lshr(bits, sixteen), one)
        return builder.add(bits, builder.add(odd, half))

    def prefetch(self, address: ir.Value) -> None:
        """Ask for a line of memory that is read soon and kept near."""
        self._call("llvm.prefetch.p0", _VOID, self.pointer(address), _I32(0), _I32(3), _I32(1))


@intrinsic
def sums_of_panel(_context):
    """Return the address of memory of the kernel's own: a panel's sums, then two shapes of tiles."""

    def generate(_target: Any, builder: Any, _signature: Any, _arguments: Any) -> Any:
        memory = cgutils.alloca_once(builder, ir.ArrayType(_I8, PANEL_SUMS * 4 + 128))
        memory.align = 64
        return builder.ptrtoint(memory, _I64)

    return types.int64(), generate


@intrinsic
def configure_tiles(_context, address):
    """Take the shapes of tiles, 64 bytes, from an address."""

    def generate(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        _Machine(builder).configure(arguments[0])
        return _I64(0)

    return types.int64(types.int64), generate


@intrinsic
def release_tiles(_context):
    """Leave the matrix unit as it was found."""

    def generate(_target: Any, builder: Any, _signature: Any, _arguments: Any) -> Any:
        _Machine(builder).release()
        return _I64(0)

    return types.int64(), generate


@intrinsic
def multiply_panel(_context, weights, x, stride, num_steps, out):
    """Write the products of up to 16 rows with a panel, float32 [rows, 64]; steps are of 32 inputs."""

    def generate(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        weights, x, stride, num_steps, out = arguments
        machine = _Machine(builder)
        for tile in range(4):
            machine.zero(tile)

        def step(index: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
            machine.load(_ROWS[0], builder.add(x, builder.mul(index, _I64(64))), stride)
            place = builder.add(weights, builder.mul(index, _I64(_STEP_BYTES)))
            for tile in range(4):
                held = _WEIGHTS[tile % 2]
                machine.load(held, builder.add(place, _I64(tile * _TILE_BYTES)), _I64(64))
                machine.multiply(tile, _ROWS[0], held)
            return []

        loop(builder, _I64(0), num_steps, 1, [], step)
        for tile in range(4):
            machine.store(tile, builder.add(out, _I64(tile * 64)), PANEL_OUTPUTS * 4)
        return _I64(0)

    return types.int64(*[types.int64] * 5), generate


@intrinsic
def multiply_tile(_context, weights, x, stride, num_steps, out):
    """Write the products of up to 16 rows with 16 outputs, float32 [rows, 16]; a tile for every step."""

    def generate(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        weights, x, stride, num_steps, out = arguments
        machine = _Machine(builder)
        machine.zero(0)

        def step(index: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
            machine.load(_ROWS[0], builder.add(x, builder.mul(index, _I64(64))), stride)
            machine.load(_WEIGHTS[0], builder.add(weights, builder.mul(index, _I64(_TILE_BYTES))), _I64(64))
            machine.multiply(0, _ROWS[0], _WEIGHTS[0])
            return []

        loop(builder, _I64(0), num_steps, 1, [], step)
        machine.store(0, out, 64)
        return _I64(0)

    return types.int64(*[types.int64] * 5), generate


@intrinsic
def multiply_four_blocks(_context, weights, x, stride, num_steps, out):
    """Write the products of 64 rows with 16 outputs, float32 [64, 16]; a tile for every step."""

    def generate(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        weights, x, stride, num_steps, out = arguments
        machine = _Machine(builder)
        starts = [builder.add(x, builder.mul(stride, _I64(TILE_ROWS * tile))) for tile in range(4)]
        for tile in range(4):
            machine.zero(tile)

        def step(index: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
            machine.load(_WEIGHTS[0], builder.add(weights, builder.mul(index, _I64(_TILE_BYTES))), _I64(64))
            for tile, start in enumerate(starts):
                held = _ROWS[tile % 2]
                machine.load(held, builder.add(start, builder.mul(index, _I64(64))), stride)
                machine.multiply(tile, held, _WEIGHTS[0])
            return []

        loop(builder, _I64(0), num_steps, 1, [], step)
        for tile in range(4):
            machine.store(tile, builder.add(out, _I64(tile * _TILE_BYTES)), 64)
        return _I64(0)

    return types.int64(*[types.int64] * 5), generate


@intrinsic
def multiply_half_panel(_context, weights, x, stride, num_steps, out):
    """Write the products of 17 to 32 rows with half a panel, float32 [rows, 32]."""

    def generate(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        weights, x, stride, num_steps, out = arguments
        machine = _Machine(builder)
        for tile in range(4):
            machine.zero(tile)
        below = builder.add(x, builder.mul(stride, _I64(TILE_ROWS)))

        def step(index: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
            across = builder.mul(index, _I64(64))
            place = builder.add(weights, builder.mul(index, _I64(_STEP_BYTES)))
            machine.load(_WEIGHTS[0], place, _I64(64))
            machine.load(_ROWS[0], builder.add(x, across), stride)
            machine.load(_WEIGHTS[1], builder.add(place, _I64(_TILE_BYTES)), _I64(64))
            machine.load(_ROWS[1], builder.add(below, across), stride)
            for tile in range(4):
                machine.multiply(tile, _ROWS[tile // 2], _WEIGHTS[tile % 2])
            return []

        loop(builder, _I64(0), num_steps, 1, [], step)
        for tile in range(4):
            first = tile // 2 * TILE_ROWS * 128 + tile % 2 * 64
            machine.store(tile, builder.add(out, _I64(first)), 128)
        return _I64(0)

    return types.int64(*[types.int64] * 5), generate


@intrinsic
def multiply_row(_context, weights, x, num_steps, out):
    """Write the products of one row with a panel, 64 float32."""

    def generate(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        weights, x, num_steps, out = arguments
        machine = _Machine(builder)

        def step(index: ir.Value, held: list[ir.Value]) -> list[ir.Value]:
            sums = list(held)
            place = builder.add(weights, builder.mul(index, _I64(_STEP_BYTES)))
            inputs = builder.add(x, builder.mul(index, _I64(64)))
            for number in range(_LANES):
                pair = builder.load(machine.pointer(builder.add(inputs, _I64(4 * number)), _I32), align=4)
                single = builder.insert_element(ir.Constant(_BITS, ir.Undefined), pair, _I32(0))
                pairs = builder.shuffle_vector(single, single, ir.Constant(_BITS, [0] * _LANES))
                for tile in range(4):
                    line = builder.add(place, _I64(tile * _TILE_BYTES + 64 * number))
                    machine.prefetch(builder.add(line, _I64(_AHEAD)))
                    line_bits = builder.load(machine.pointer(line, _BITS), align=64)
                    sums[tile] = machine.multiply_pairs(sums[tile], pairs, line_bits)
            return sums

        zeros = [ir.Constant(_SUMS, [0.0] * _LANES)] * 4
        _, sums = loop(builder, _I64(0), num_steps, 1, zeros, step)
        for tile, total in enumerate(sums):
            place = machine.pointer(builder.add(out, _I64(64 * tile)), _SUMS)
            builder.store(total, place, align=4)
        return _I64(0)

    return types.int64(*[types.int64] * 4), generate


@intrinsic
def pair_rows(_context, source, target):
    """Write two rows of 16 float32, one after the other, as one row of 16 pairs of bfloat16."""

    def generate(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        machine = _Machine(builder)
        even, odd = (
            machine.rounded(builder.load(machine.pointer(place, _BITS), align=4))
            for place in (arguments[0], builder.add(arguments[0], _I64(64)))
        )
        upper = ir.Constant(_BITS, [-65536] * _LANES)
        low = builder.lshr(even, ir.Constant(_BITS, [16] * _LANES))
        pairs = builder.or_(low, builder.and_(odd, upper))
        builder.store(pairs, machine.pointer(arguments[1], _BITS), align=4)
        return _I64(0)

    return types.int64(types.int64, types.int64), generate


@intrinsic
def dot_pairs(_context, first, num_rows, x, size, out):
    """Write the products of rows of bfloat16, which lie one after the other, with x; 32 inputs at a time."""

    def generate(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        first, num_rows, x, size, out = arguments
        machine = _Machine(builder)

        def row_body(row: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
            start = builder.add(first, builder.mul(builder.mul(row, size), _I64(2)))

            def multiply(num_sums: int) -> Any:
                def body(index: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
                    across = builder.mul(index, _I64(2))
                    found = []
                    for number, total in enumerate(sums):
                        place = builder.add(across, _I64(64 * number))
                        line = builder.add(start, place)
                        if num_sums > 1:
                            machine.prefetch(builder.add(line, _I64(_AHEAD_OF_ROWS)))
                        held, factor = (
                            builder.load(machine.pointer(one, _BITS), align=2)
                            for one in (line, builder.add(x, place))
                        )
                        found.append(machine.multiply_pairs(total, held, factor))
                    return found

                return body

            zeros = [ir.Constant(_SUMS, [0.0] * _LANES)] * 2
            index, sums = loop(builder, _I64(0), size, 64, zeros, multiply(2))
            _, last = loop(builder, index, size, 32, sums[:1], multiply(1))
            total = sum_lanes(builder, builder.fadd(last[0], sums[1]))
            place = builder.add(out, builder.mul(row, _I64(4)))
            builder.store(total, machine.pointer(place, ir.FloatType()), align=4)
            return []

        loop(builder, _I64(0), num_rows, 1, [], row_body)
        return _I64(0)

    return types.int64(*[types.int64] * 5), generate


@intrinsic
def interleave(_context, even, odd, target):
    """Write two rows of 16 bfloat16 as one row of 16 pairs."""

    def generate(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        machine = _Machine(builder)
        low, high = (
            builder.zext(builder.load(machine.pointer(place, _HALVES), align=2), _BITS)
            for place in arguments[:2]
        )
        pairs = builder.or_(low, builder.shl(high, ir.Constant(_BITS, [16] * _LANES)))
        builder.store(pairs, machine.pointer(arguments[2], _BITS), align=4)
        return _I64(0)

    return types.int64(types.int64, types.int64, types.int64), generate


@intrinsic
def add_lanes(_context, source, target):
    """Add 16 float32 to 16 bfloat16."""

    def generate(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        machine = _Machine(builder)
        sixteen = ir.Constant(_BITS, [16] * _LANES)
        place = machine.pointer(arguments[1], _HALVES)
        held = builder.shl(builder.zext(builder.load(place, align=2), _BITS), sixteen)
        source = builder.load(machine.pointer(arguments[0], _SUMS), align=4)
        total = builder.fadd(builder.bitcast(held, _SUMS), source)
        bits = machine.rounded(builder.bitcast(total, _BITS))
        builder.store(builder.trunc(builder.lshr(bits, sixteen), _HALVES), place, align=2)
        return _I64(0)

    return types.int64(types.int64, types.int64), generate


@intrinsic
def round_lanes(_context, source, target):
    """Write 16 float32 as the nearest bfloat16, of two equally near ones the even."""

    def generate(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        machine = _Machine(builder)
        bits = machine.rounded(builder.load(machine.pointer(arguments[0], _BITS), align=4))
        halves = builder.trunc(builder.lshr(bits, ir.Constant(_BITS, [16] * _LANES)), _HALVES)
        builder.store(halves, machine.pointer(arguments[1], _HALVES), align=2)
        return _I64(0)

    return types.int64(types.int64, types.int64), generate
