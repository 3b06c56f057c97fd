"""The lines of a weight in tiles, as they are read: a line is a pair of inputs for each of 16 outputs.

They lie as bfloat16 where a matrix unit reads them, else dense (dense.py): a quarter smaller, and as exact.
All addresses are int64.
"""

# mypy: disable-error-code="no-untyped-call"

from collections.abc import Iterator

from llvmlite import ir

from luthier.modeling.kernels._features import HAS_PAIRS, HAS_UNIT, has_feature
from luthier.modeling.kernels._machine import BITS, I8, STEP_BYTES, TILE_BYTES, Machine
from luthier.modeling.kernels._memory import I16, I32, I64, LANES, call
from luthier.modeling.kernels.dense import DENSE_STEP_BYTES, DENSE_TILE_BYTES

# Whether weights lie dense here; AVX-512 VBMI looks 64 bytes up at once.
LIE_DENSE = HAS_PAIRS and not HAS_UNIT and has_feature("avx512vbmi")
_LINE, _QUARTER = 64, 16
_BYTES = ir.VectorType(I8, _LINE)
# Lines of a tile that are read together, and the lines of memory that these four lie in.
_TOGETHER, _STORED = 4, 3


class PlainLines:
    """Lines as they are."""

    step_bytes, tile_bytes = STEP_BYTES, TILE_BYTES

    def asked_at(self, line: int) -> int | None:
        """Return how far into a tile lies what is asked for beside a line's products; None for nothing."""
        return _LINE * line

    def of_tiles(self, builder: ir.IRBuilder, places: list[ir.Value]) -> Iterator[list[ir.Value]]:
        """Yield the first line of each tile, then the second of each, up to the last."""
        machine = Machine(builder)
        for line in range(LANES):
            here = [builder.add(place, I64(_LINE * line)) for place in places]
            yield [builder.load(machine.pointer(one, BITS), align=4) for one in here]


class DenseLines:
    """Lines of a panel that lies dense.

    Args:
        builder: where the code goes, outside of its loops.
    """

    step_bytes, tile_bytes = DENSE_STEP_BYTES, DENSE_TILE_BYTES

    def __init__(self, builder: ir.IRBuilder, header: ir.Value) -> None:
        machine, quarter = Machine(builder), ir.VectorType(I8, _QUARTER)
        everywhere = ir.Constant(ir.VectorType(I32, _LINE), [byte % _QUARTER for byte in range(_LINE)])
        held = builder.load(machine.pointer(header, quarter), align=_QUARTER)
        self._upper_bytes = builder.shuffle_vector(held, held, everywhere)

    def asked_at(self, line: int) -> int | None:
        """Return how far into a tile lies what is asked for beside a line's products; None for nothing."""
        group, number = divmod(line, _TOGETHER)
        return (group * _STORED + number) * _LINE if number < _STORED else None

    def of_tiles(self, builder: ir.IRBuilder, places: list[ir.Value]) -> Iterator[list[ir.Value]]:
        """Yield the first line of each tile, then the second of each, up to the last."""
        for group in range(LANES // _TOGETHER):
            for half in range(2):
                pairs = [self._two_lines(builder, place, group, half) for place in places]
                for number in range(2):
                    yield [pair[number] for pair in pairs]

    def _two_lines(self, builder: ir.IRBuilder, tile: ir.Value, group: int, half: int) -> list[ir.Value]:
        machine = Machine(builder)

        def load(line: int) -> ir.Value:
            place = builder.add(tile, I64((group * _STORED + line) * _LINE))
            return builder.load(machine.pointer(place, _BYTES), align=_LINE)

        codes, lower = load(0), load(1 + half)
        if half:
            # What comes from the byte beside is above the six bits that say which, or says nothing.
            words = builder.bitcast(codes, ir.VectorType(I16, _LINE // 2))
            words = builder.lshr(words, ir.Constant(words.type, [4] * (_LINE // 2)))
            codes = builder.bitcast(words, _BYTES)
        upper = call(builder, "llvm.x86.avx512.permvar.qi.512", _BYTES, [self._upper_bytes, codes])
        lines = []
        for first in (0, _QUARTER // 2):
            # Of each quarter's bytes eight, the lower one of a number before its upper one.
            order = [
                quarter + first + byte + which
                for quarter in range(0, _LINE, _QUARTER)
                for byte in range(_QUARTER // 2)
                for which in (0, _LINE)
            ]
            mixed = builder.shuffle_vector(lower, upper, ir.Constant(ir.VectorType(I32, _LINE), order))
            lines.append(builder.bitcast(mixed, BITS))
        return lines


Lines = PlainLines | DenseLines


def lines_of(builder: ir.IRBuilder, header: ir.Value) -> Lines:
    """Return the lines of the panel that begins at an address, as they lie here."""
    return DenseLines(builder, header) if LIE_DENSE else PlainLines()
