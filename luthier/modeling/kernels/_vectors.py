"""Products of vectors in memory, written in LLVM's vectors of 16 float32 over float32 or bfloat16 memory.

The compiler's own vectors stop at a conversion of bits in the middle of a sum; these keep the sums of four
rows, or of 64 columns, in registers and read each weight once. All addresses are int64, all strides count
numbers, and `like` is a kernel's typed pointer, which says what the rows hold.
"""

# What an intrinsic takes is in its arguments, which only the generated code reads.
# ruff: noqa: ARG001
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

_I64, _I32, _I16, _F32 = ir.IntType(64), ir.IntType(32), ir.IntType(16), ir.FloatType()
_LANES = 16
_VECTOR, _WIDE_BITS = ir.VectorType(_F32, _LANES), ir.VectorType(_I32, _LANES)
# Sums that are kept at a time: as many as hide the time that one multiplication takes.
_NUM_SUMS = 4
# How far ahead of their use rows are asked for, in numbers; measured.
_AHEAD = 1024


def item_size(like):
    """Return the bytes of one number."""


@overload(item_size, inline="always")
def _item_size_overload(like):
    size = 2 if like.dtype == types.uint16 else 4
    return lambda like: size  # noqa: ARG005


class _Memory:
    """Numbers of one type in memory, read and written as float32.

    Args:
        builder: where the code goes.
        is_bfloat16: whether they are bfloat16, else float32.
    """

    def __init__(self, builder: ir.IRBuilder, *, is_bfloat16: bool) -> None:
        self._builder = builder
        self._is_bfloat16 = is_bfloat16
        self._size = 2 if is_bfloat16 else 4

    def load(self, address: ir.Value, index: ir.Value, lanes: int) -> ir.Value:
        """Return `lanes` numbers from an index on as one float32 vector, or one float32."""
        builder = self._builder
        held: ir.Type = _I16 if self._is_bfloat16 else _F32
        wide: ir.Type = _I32
        if lanes > 1:
            held, wide = ir.VectorType(held, lanes), _WIDE_BITS
        stored = builder.load(self._pointer(address, index, held), align=self._size)
        if not self._is_bfloat16:
            return stored
        shift = _I32(16) if lanes == 1 else ir.Constant(_WIDE_BITS, [16] * lanes)
        bits = builder.shl(builder.zext(stored, wide), shift)
        return builder.bitcast(bits, _F32 if lanes == 1 else _VECTOR)

    def store(self, value: ir.Value, address: ir.Value, index: ir.Value) -> None:
        """Write a float32 or a vector of them; only for float32 memory."""
        self._builder.store(value, self._pointer(address, index, value.type), align=self._size)

    def prefetch(self, address: ir.Value, index: ir.Value) -> None:
        """Ask for a line of memory that is read soon."""
        module, name = self._builder.module, "llvm.prefetch.p0"
        function = module.globals.get(name)
        if function is None:
            kind = ir.FunctionType(ir.VoidType(), [ir.IntType(8).as_pointer(), _I32, _I32, _I32])
            function = ir.Function(module, kind, name=name)
        place = self._pointer(address, index, ir.IntType(8))
        self._builder.call(function, [place, _I32(0), _I32(3), _I32(1)])

    def _pointer(self, address: ir.Value, index: ir.Value, held: ir.Type) -> ir.Value:
        builder = self._builder
        place = builder.add(address, builder.mul(index, _I64(self._size)))
        return builder.inttoptr(place, held.as_pointer())


_Body = Callable[[ir.Value, list[ir.Value]], list[ir.Value]]


def loop(
    builder: ir.IRBuilder, begin: ir.Value, end: ir.Value, step: int, carried: list[ir.Value], body: _Body
) -> tuple[ir.Value, list[ir.Value]]:
    """Emit a loop while `index + step <= end`; return where it stopped and what it carried."""
    before = builder.block
    head, inside, after = (builder.append_basic_block() for _ in range(3))
    builder.branch(head)
    builder.position_at_end(head)
    index = builder.phi(_I64)
    index.add_incoming(begin, before)
    held = [builder.phi(value.type) for value in carried]
    for phi, value in zip(held, carried, strict=True):
        phi.add_incoming(value, before)
    builder.cbranch(builder.icmp_signed("<=", builder.add(index, _I64(step)), end), inside, after)
    builder.position_at_end(inside)
    renewed = body(index, held)
    following = builder.add(index, _I64(step))
    index.add_incoming(following, builder.block)
    for phi, value in zip(held, renewed, strict=True):
        phi.add_incoming(value, builder.block)
    builder.branch(head)
    builder.position_at_end(after)
    return index, held


def _sum_four(builder: ir.IRBuilder, vectors: list[ir.Value]) -> ir.Value:
    """Return the sums of the numbers of four vectors, as a vector of four."""

    def shuffled(a: ir.Value, b: ir.Value, lanes: list[int]) -> ir.Value:
        return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_I32, len(lanes)), lanes))

    def halved(a: ir.Value, b: ir.Value, width: int) -> ir.Value:
        """Add the upper to the lower half of each part of so many lanes; a's parts come before b's."""
        low = [start + lane for start in range(0, 2 * _LANES, width) for lane in range(width // 2)]
        high = [lane + width // 2 for lane in low]
        return builder.fadd(shuffled(a, b, low), shuffled(a, b, high))

    first, second = halved(vectors[0], vectors[1], 16), halved(vectors[2], vectors[3], 16)
    parts = halved(first, second, 8)
    for step in (2, 1):
        others = [lane ^ step for lane in range(_LANES)]
        parts = builder.fadd(parts, shuffled(parts, parts, others))
    return shuffled(parts, parts, [0, 4, 8, 12])


def sum_lanes(builder: ir.IRBuilder, vector: ir.Value) -> ir.Value:
    """Return the sum of a vector's 16 numbers, halves added to halves."""
    for step in (8, 4, 2, 1):
        others = ir.Constant(_WIDE_BITS, [lane ^ step for lane in range(_LANES)])
        vector = builder.fadd(vector, builder.shuffle_vector(vector, vector, others))
    return builder.extract_element(vector, _I32(0))


def _broadcast(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    vector = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), value, _I32(0))
    return builder.shuffle_vector(vector, vector, ir.Constant(_WIDE_BITS, [0] * _LANES))


def _multiply_add(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, total: ir.Value) -> ir.Value:
    product = builder.fmul(a, b, flags=("contract",))
    return builder.fadd(product, total, flags=("contract",))


def _is_bfloat16(like: Any) -> bool:
    return like.dtype == types.uint16


def _emit_dots(
    builder: ir.IRBuilder, arguments: tuple[ir.Value, ...], num_others: int, rows: _Memory, other: _Memory
) -> None:
    """Emit the products of four rows with each of some vectors; each row is read once."""
    first, stride, x, x_stride, size, out, out_stride = arguments
    numbers, others = range(_NUM_SUMS), range(num_others)
    starts = [builder.mul(stride, _I64(number)) for number in numbers]
    x_starts = [builder.mul(x_stride, _I64(number)) for number in others]

    def multiply(lanes: int) -> _Body:
        def body(index: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
            factors = [other.load(x, builder.add(start, index), lanes) for start in x_starts]
            places = [builder.add(start, index) for start in starts]
            if lanes > 1:
                # The rows after these, which follow them in memory.
                ahead = builder.mul(stride, _I64(_NUM_SUMS))
                for place in places:
                    rows.prefetch(first, builder.add(place, ahead))
            held = [rows.load(first, place, lanes) for place in places]
            pairs = [(row, factor) for factor in factors for row in held]
            return [
                _multiply_add(builder, row, factor, total)
                for (row, factor), total in zip(pairs, sums, strict=True)
            ]

        return body

    num_sums = _NUM_SUMS * num_others
    zeros = [ir.Constant(_VECTOR, [0.0] * _LANES)] * num_sums
    index, vectors = loop(builder, _I64(0), size, _LANES, zeros, multiply(_LANES))
    _, rest = loop(builder, index, size, 1, [_F32(0.0)] * num_sums, multiply(1))
    memory = _Memory(builder, is_bfloat16=False)
    for which in others:
        own = slice(which * _NUM_SUMS, (which + 1) * _NUM_SUMS)
        total = _sum_four(builder, vectors[own])
        for row, single in enumerate(rest[own]):
            both = builder.fadd(builder.extract_element(total, _I32(row)), single)
            total = builder.insert_element(total, both, _I32(row))
        memory.store(total, out, builder.mul(out_stride, _I64(which)))


@intrinsic
def dot_rows(_context, first, num_rows, x, size, out, like):
    """Write the products of rows, which lie one after the other, with x, float32; all are read in order."""

    def generate(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        first, num_rows, x, size, out = arguments[:5]
        rows = _Memory(builder, is_bfloat16=_is_bfloat16(like))
        memory = _Memory(builder, is_bfloat16=False)

        def row_body(row: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
            start = builder.mul(row, size)

            def multiply(lanes: int, num_sums: int) -> _Body:
                def body(index: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
                    places = [builder.add(index, _I64(lanes * number)) for number in range(num_sums)]
                    if num_sums > 1:
                        ahead = builder.add(builder.add(start, index), _I64(_AHEAD))
                        for line in range(0, num_sums, 2):
                            rows.prefetch(first, builder.add(ahead, _I64(line * _LANES)))
                    return [
                        _multiply_add(
                            builder,
                            rows.load(first, builder.add(start, place), lanes),
                            memory.load(x, place, lanes),
                            total,
                        )
                        for place, total in zip(places, sums, strict=True)
                    ]

                return body

            zeros = [ir.Constant(_VECTOR, [0.0] * _LANES)] * _NUM_SUMS
            width = _NUM_SUMS * _LANES
            index, sums = loop(builder, _I64(0), size, width, zeros, multiply(_LANES, _NUM_SUMS))
            index, first_sum = loop(builder, index, size, _LANES, sums[:1], multiply(_LANES, 1))
            _, rest = loop(builder, index, size, 1, [_F32(0.0)], multiply(1, 1))
            total = _sum_four(builder, [*first_sum, *sums[1:]])
            for lane in range(_NUM_SUMS):
                rest = [builder.fadd(rest[0], builder.extract_element(total, _I32(lane)))]
            memory.store(rest[0], out, row)
            return []

        loop(builder, _I64(0), num_rows, 1, [], row_body)
        return ir.Constant(_I64, 0)

    return types.int64(*[types.int64] * 5, like), generate


def _dots_with(num_others: int) -> Any:
    @intrinsic
    def dots(_context, first, stride, x, x_stride, size, out, out_stride, like):
        """Write the products of four rows with each of some vectors, which are float32."""

        def generate(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            rows = _Memory(builder, is_bfloat16=_is_bfloat16(like))
            other = _Memory(builder, is_bfloat16=False)
            _emit_dots(builder, tuple(arguments[:7]), num_others, rows, other)
            return ir.Constant(_I64, 0)

        return types.int64(*[types.int64] * 7, like), generate

    return dots


# By how many vectors: each keeps four sums, 16 in all, for which AVX-512 has the registers.
dot_four_rows_with_1, dot_four_rows_with_2, dot_four_rows_with_3, dot_four_rows_with_4 = (
    _dots_with(number) for number in (1, 2, 3, 4)
)


def _emit_additions(
    builder: ir.IRBuilder, arguments: tuple[ir.Value, ...], num_outs: int, rows: _Memory
) -> None:
    """Emit the additions of rows, each times a factor, to each of some vectors; each row is read once."""
    first, stride, factors, factors_stride, num_rows, out, out_stride, size = arguments
    memory = _Memory(builder, is_bfloat16=False)
    factor_starts = [builder.mul(factors_stride, _I64(number)) for number in range(num_outs)]
    out_starts = [builder.mul(out_stride, _I64(number)) for number in range(num_outs)]

    def columns(lanes: int, num_sums: int) -> _Body:
        def body(column: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
            places = [builder.add(column, _I64(lanes * number)) for number in range(num_sums)]
            outs = [builder.add(start, place) for start in out_starts for place in places]

            def row_body(row: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
                start = builder.mul(row, stride)
                if num_sums > 1:
                    ahead = builder.add(builder.add(start, column), _I64(_AHEAD))
                    for line in range(0, num_sums, 2):
                        rows.prefetch(first, builder.add(ahead, _I64(line * _LANES)))
                held = [rows.load(first, builder.add(start, place), lanes) for place in places]
                found = [memory.load(factors, builder.add(start, row), 1) for start in factor_starts]
                if lanes > 1:
                    found = [_broadcast(builder, factor) for factor in found]
                pairs = [(part, factor) for factor in found for part in held]
                return [
                    _multiply_add(builder, part, factor, total)
                    for (part, factor), total in zip(pairs, sums, strict=True)
                ]

            before = [memory.load(out, place, lanes) for place in outs]
            _, sums = loop(builder, _I64(0), num_rows, 1, before, row_body)
            for place, total in zip(outs, sums, strict=True):
                memory.store(total, out, place)
            return []

        return body

    index, _ = loop(builder, _I64(0), size, _NUM_SUMS * _LANES, [], columns(_LANES, _NUM_SUMS))
    index, _ = loop(builder, index, size, _LANES, [], columns(_LANES, 1))
    loop(builder, index, size, 1, [], columns(1, 1))


@intrinsic
def add_rows(_context, first, stride, factors, num_rows, out, size, like):
    """Add rows, each times its float32 factor, to the float32 numbers at out."""

    def generate(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        first, stride, factors, num_rows, out, size = arguments[:6]
        places = (first, stride, factors, _I64(0), num_rows, out, _I64(0), size)
        _emit_additions(builder, places, 1, _Memory(builder, is_bfloat16=_is_bfloat16(like)))
        return ir.Constant(_I64, 0)

    return types.int64(*[types.int64] * 6, like), generate


def _additions_to(num_outs: int) -> Any:
    @intrinsic
    def additions(_context, first, stride, factors, factors_stride, num_rows, out, out_stride, size, like):
        """Add rows to each of some vectors of float32, each row times a factor for each vector."""

        def generate(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            rows = _Memory(builder, is_bfloat16=_is_bfloat16(like))
            _emit_additions(builder, tuple(arguments[:8]), num_outs, rows)
            return ir.Constant(_I64, 0)

        return types.int64(*[types.int64] * 8, like), generate

    return additions


add_rows_to_1, add_rows_to_2, add_rows_to_3, add_rows_to_4 = (
    _additions_to(number) for number in (1, 2, 3, 4)
)
