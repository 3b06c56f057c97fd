"""The processor's own instructions as LLVM names them: for matrix tiles and for pairs of bfloat16."""

from typing import Any

from llvmlite import ir

from luthier.modeling.kernels._language import has_feature
from luthier.modeling.kernels._memory import (
    I16,
    I32,
    I64,
    LANES,
    VECTOR,
    WIDE_BITS,
    broadcast,
    call,
    is_bfloat16,
    prefetch,
)
from luthier.modeling.kernels.products import PANEL_OUTPUTS

VOID, I8 = ir.VoidType(), ir.IntType(8)
SUMS, BITS, HALVES = VECTOR, WIDE_BITS, ir.VectorType(I16, LANES)

# Whether products of pairs can be made here, and whether there is a matrix unit (products.py): by nothing but
# the features that kernels are compiled for, since their code is kept on disk under these.
HAS_PAIRS = has_feature("avx512bf16")
HAS_UNIT = has_feature("amx-tile") and has_feature("amx-bf16")
TILE_ROWS = 16
TILE_BYTES = 1024
# Of a panel and 32 inputs.
STEP_BYTES = PANEL_OUTPUTS // TILE_ROWS * TILE_BYTES


def takes_pairs(like: Any) -> bool:
    """Whether what a kernel's pointer is to is multiplied by pairs here, and adapters lie in pairs."""
    return is_bfloat16(like) and HAS_PAIRS


class _BFloat16(ir.Type):
    """LLVM's bfloat, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"


_PAIRS = ir.VectorType(_BFloat16(), 2 * LANES)


class Machine:
    """Emits the processor's own instructions.

    Args:
        builder: where the code goes.
    """

    def __init__(self, builder: ir.IRBuilder) -> None:
        self._builder = builder

    def _call(self, name: str, kind: ir.Type, *arguments: ir.Value) -> ir.Value:
        return call(self._builder, name, kind, list(arguments))

    def pointer(self, address: ir.Value, held: ir.Type = I8) -> ir.Value:
        return self._builder.inttoptr(address, held.as_pointer())

    def configure(self, address: ir.Value) -> None:
        self._call("llvm.x86.ldtilecfg", VOID, self.pointer(address))

    def release(self) -> None:
        self._call("llvm.x86.tilerelease", VOID)

    def zero(self, tile: int) -> None:
        self._call("llvm.x86.tilezero", VOID, I8(tile))

    def load(self, tile: int, address: ir.Value, stride: ir.Value) -> None:
        self._call("llvm.x86.tileloadd64", VOID, I8(tile), self.pointer(address), stride)

    def store(self, tile: int, address: ir.Value, stride: int) -> None:
        self._call("llvm.x86.tilestored64", VOID, I8(tile), self.pointer(address), I64(stride))

    def multiply(self, sums: int, rows: int, weights: int) -> None:
        self._call("llvm.x86.tdpbf16ps", VOID, I8(sums), I8(rows), I8(weights))

    def multiply_pairs(self, sums: ir.Value, weights: ir.Value, pair: ir.Value) -> ir.Value:
        weights, pair = (self._builder.bitcast(one, _PAIRS) for one in (weights, pair))
        return self._call("llvm.x86.avx512bf16.dpbf16ps.512", SUMS, sums, weights, pair)

    def repeated(self, address: ir.Value) -> ir.Value:
        """Return a pair of bfloat16 in memory 16 times."""
        pair = self._builder.load(self.pointer(address, I32), align=2)
        return broadcast(self._builder, pair)

    def opaque(self, value: ir.Value) -> ir.Value:
        """Return a whole number of which the compiler knows nothing.

        It would make rows that are equally far apart one out of the other, each waiting for the last.
        """
        kind = ir.FunctionType(I64, [I64])
        return self._builder.asm(kind, "", "=r,0", [value], side_effect=False)

    def prefetch_behind(self, address: ir.Value) -> None:
        """Ask for a line between the loads around, into the cache behind the nearest.

        The nearest has few lines on their way at a time, and whoever asks for one more waits. The compiler
        would move many to one place.
        """
        prefetch(self._builder, self.pointer(address), is_nearest=False)
        # No instruction, but nothing of memory is moved across it.
        self._builder.asm(ir.FunctionType(VOID, []), "", "", [], side_effect=True)
