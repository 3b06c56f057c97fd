"""The processor's own instructions, as LLVM names them or as text: for pairs of bfloat16."""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: ARG005

from typing import Any

from llvmlite import binding, ir
from numba.extending import overload

from luthier_cpu.codegen.memory_access import (
    HAS_PAIRS,
    I32,
    I64,
    LANES,
    VECTOR,
    WIDE_BITS,
    BFloat16,
    broadcast,
    call,
    is_bfloat16,
    prefetch,
)
from luthier_cpu.gemm.tile_shapes import PANEL_OUTPUTS, TILE_ROWS

# Addresses that an instruction's text may use, of 16 that there are, and pairs that are held at a time.
_MOST_ADDRESSES, _MOST_PAIRS = 8, 3
# Without it only empty assembly is taken.
binding.initialize_native_asmparser()
VOID, I8 = ir.VoidType(), ir.IntType(8)
SUMS, BITS = VECTOR, WIDE_BITS

# A line of a tile is a pair of inputs for each of 16 outputs.
TILE_BYTES, LINE_BYTES = 1024, 64
# Of a panel and 32 inputs.
STEP_BYTES = PANEL_OUTPUTS // TILE_ROWS * TILE_BYTES


def takes_pairs(like: Any) -> bool:
    """Whether what a kernel's pointer is to is multiplied by pairs here; adapters are stored so."""
    return is_bfloat16(like) and HAS_PAIRS


def are_paired(data):
    """Return what `takes_pairs` does, within a kernel."""


@overload(are_paired, inline="always")
def _are_paired_overload(data):
    found = takes_pairs(data)
    return lambda data: found


_PAIRS = ir.VectorType(BFloat16(), 2 * LANES)


class Machine:
    """Emits the processor's own instructions."""

    def __init__(self, builder: ir.IRBuilder) -> None:
        self._builder = builder

    def pointer(self, address: ir.Value, held: ir.Type = I8) -> ir.Value:
        return self._builder.inttoptr(address, held.as_pointer())

    def multiply_pairs(self, sums: ir.Value, weights: ir.Value, pair: ir.Value) -> ir.Value:
        weights, pair = (self._builder.bitcast(one, _PAIRS) for one in (weights, pair))
        return call(self._builder, "llvm.x86.avx512bf16.dpbf16ps.512", SUMS, [sums, weights, pair])

    def multiply_line(
        self, sums: list[ir.Value], rows: list[ir.Value], offset: int, weights: list[ir.Value]
    ) -> list[ir.Value]:
        """Add the products of a pair of each row and lines of weights to sums, of up to 8 rows in this order.

        A compiler puts what adds to a sum near to what added to it before, and the processor waits. It does
        not know that these instructions read the rows: the kernel that they are in may not write them.

        Args:
            sums: of each row those with all lines.
            offset: bytes from these to the pairs.
        """
        if len(rows) > _MOST_ADDRESSES:
            pairs = [self.repeated(self._builder.add(row, I64(offset))) for row in rows]
            both = [(pair, line) for pair in pairs for line in weights]
            return [self.multiply_pairs(one, *operands) for one, operands in zip(sums, both, strict=True)]
        num_sums, num_pairs = len(sums), min(len(rows), _MOST_PAIRS)
        # Operands by their numbers: sums and pairs, which are written, sums as they were, lines, rows.
        first_line = 2 * num_sums + num_pairs
        first_row = first_line + len(weights)
        text = []
        for row in range(len(rows)):
            pair = f"${num_sums + row % num_pairs}"
            text.append(f"vpbroadcastd {offset}(${first_row + row}), {pair}")
            for line in range(len(weights)):
                text.append(f"vdpbf16ps ${first_line + line}, {pair}, ${row * len(weights) + line}")
        outputs = num_sums + num_pairs
        constraints = ["=&v"] * outputs + [str(number) for number in range(num_sums)]
        constraints += ["v"] * len(weights) + ["r"] * len(rows)
        operands = [*sums, *weights, *rows]
        kind = ir.FunctionType(ir.LiteralStructType([SUMS] * outputs), [one.type for one in operands])
        made = self._builder.asm(kind, "; ".join(text), ",".join(constraints), operands, side_effect=False)
        return [self._builder.extract_value(made, number) for number in range(num_sums)]

    def line(self, tile: ir.Value, number: int) -> ir.Value:
        """Return a line of the tile that begins at an address."""
        place = self._builder.add(tile, I64(LINE_BYTES * number))
        return self._builder.load(self.pointer(place, BITS), align=4)

    def repeated(self, address: ir.Value) -> ir.Value:
        """Return a pair of bfloat16 in memory 16 times."""
        pair = self._builder.load(self.pointer(address, I32), align=2)
        return broadcast(self._builder, pair)

    def opaque(self, value: ir.Value) -> ir.Value:
        """Return a whole number of which the compiler knows nothing.

        It would make rows that are at equal distances one out of the other, each waiting for the last.
        """
        kind = ir.FunctionType(I64, [I64])
        return self._builder.asm(kind, "", "=r,0", [value], side_effect=False)

    def prefetch_behind(self, address: ir.Value) -> None:
        """Ask for a line between the loads around, into the cache behind the nearest.

        The nearest has few lines on their way at a time, and a further request waits. The compiler
        would move many to one place.
        """
        prefetch(self._builder, self.pointer(address), is_nearest=False)
        # No instruction, but nothing of memory is moved across it.
        self._builder.asm(ir.FunctionType(VOID, []), "", "~{memory}", [], side_effect=True)
