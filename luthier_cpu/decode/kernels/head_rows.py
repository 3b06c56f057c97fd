"""Rows of attention in LLVM's vectors: one head of one token, and one query's scores over its keys.

Both are short, a head 64 numbers and a query's keys some dozens: what the compiler makes of loops over them
spends most of its time on questions of overlap and on the last few numbers one by one. All addresses are
int64; `like` is a kernel's typed pointer, which says what the rows hold.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types

from luthier_cpu.codegen.instructions import Machine
from luthier_cpu.codegen.memory_access import (
    F32,
    HALVES,
    I64,
    LANES,
    VECTOR,
    WIDE_BITS,
    Memory,
    broadcast,
    call,
    constant,
    emitted,
    is_bfloat16,
    lanes_below,
    loop,
    multiply_add,
    over,
    reduced,
    sum_lanes,
    transposed,
)
from luthier_cpu.codegen.numba_kernel import EXP_HIGHEST, EXP_LOWEST, LN2_HIGH, LN2_LOW, LOG2_E
from luthier_cpu.gemm.bf16_gemm import paired_bits


@emitted()
def copy_row(builder, source, target, size, like):
    """Copy a row of numbers."""
    memory = Memory(builder, is_bfloat16=is_bfloat16(like))

    def copy(index: ir.Value, lanes: int) -> None:
        memory.store_bits(memory.load_bits(source, index, lanes), target, index)

    over(builder, I64(0), size, copy)


def emit_turn(
    builder: ir.IRBuilder, places: list[ir.Value], rows: Memory, targets: Memory, *, is_inverse: bool = False
) -> None:
    """Emit the turning of the pairs (c, c + half) of a row by float32 angles, times a factor."""
    source, target, cosine, sine, half, scale = places
    angles = Memory(builder, is_bfloat16=False)

    def turn(index: ir.Value, lanes: int) -> None:
        factor = broadcast(builder, scale) if lanes > 1 else scale
        other = builder.add(index, half)
        first, second = rows.load(source, index, lanes), rows.load(source, other, lanes)
        cosines, sines = angles.load(cosine, index, lanes), angles.load(sine, index, lanes)
        if is_inverse:
            sines = builder.fneg(sines)
        crossed = builder.fmul(second, sines)
        one = multiply_add(builder, first, cosines, builder.fneg(crossed))
        two = multiply_add(builder, second, cosines, builder.fmul(first, sines))
        targets.store(builder.fmul(one, factor), target, index)
        targets.store(builder.fmul(two, factor), target, other)

    over(builder, I64(0), half, turn)


def _turning(*, is_inverse: bool) -> Any:
    @emitted(scale=types.float32)
    def turn(builder, source, target, cosine, sine, half, scale, like):
        places = [source, target, cosine, sine, half, scale]
        rows = Memory(builder, is_bfloat16=is_bfloat16(like))
        emit_turn(builder, places, rows, rows, is_inverse=is_inverse)

    return turn


# Turn a row by the angles of its position (Su et al. 2021, arXiv 2104.09864), and back.
turn_row, turn_row_back = _turning(is_inverse=False), _turning(is_inverse=True)


@emitted()
def transpose_scaled(builder, source, factors, target, stride, like):
    """Write 16 rows of 16 float32, one after the other, as 16 columns at a stride in bytes; number i of each
    row is multiplied by factor i."""
    floats = Memory(builder, is_bfloat16=False)
    held = Memory(builder, is_bfloat16=is_bfloat16(like))
    factor = floats.load(factors, I64(0), LANES)
    rows = [
        builder.bitcast(builder.fmul(floats.load(source, I64(LANES * row), LANES), factor), WIDE_BITS)
        for row in range(LANES)
    ]
    for row, column in enumerate(transposed(builder, rows)):
        held.store(
            builder.bitcast(column, VECTOR), builder.add(target, builder.mul(stride, I64(row))), I64(0)
        )


def exponential_16(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """Emit what `_language.exponential` computes, for 16 numbers."""

    lowest, highest = constant(VECTOR, EXP_LOWEST), constant(VECTOR, EXP_HIGHEST)
    x = builder.select(builder.fcmp_ordered("<", x, lowest), lowest, x)
    x = builder.select(builder.fcmp_ordered(">", x, highest), highest, x)
    scaled = multiply_add(builder, x, constant(VECTOR, LOG2_E), constant(VECTOR, 0.5))
    n = call(builder, "llvm.floor.v16f32", VECTOR, [scaled])
    r = multiply_add(builder, n, constant(VECTOR, -LN2_HIGH), x)
    r = multiply_add(builder, n, constant(VECTOR, -LN2_LOW), r)
    p = constant(VECTOR, 1.0 / 5040)
    for coefficient in (1.0 / 720, 1.0 / 120, 1.0 / 24, 1.0 / 6, 0.5, 1.0, 1.0):
        p = multiply_add(builder, p, r, constant(VECTOR, coefficient))
    biased = builder.add(builder.fptosi(n, WIDE_BITS), constant(WIDE_BITS, 127))
    power = builder.bitcast(builder.shl(biased, constant(WIDE_BITS, 23)), VECTOR)
    return builder.fmul(p, power)


def _larger(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    """Return the larger numbers; those of b where a's is none."""
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


@emitted()
def weigh_columns(builder, scores, num_keys, highest, totals, factors, weights):
    """Turn scores of 16 queries, float32 [keys, 16], into weights beside each query's highest so far.

    Weights go as bfloat16 pairs of two keys, [keys / 2, 16, 2]; keys are a multiple of 4, and one whose score
    is the lowest weighs nothing. `highest` and the sums of weights, `totals`, are updated, and `factors` get
    what all earlier sums are to be multiplied by.
    """
    floats, machine = Memory(builder, is_bfloat16=False), Machine(builder)
    before = floats.load(highest, I64(0), LANES)

    def row(index: ir.Value, number: int) -> ir.Value:
        place = builder.mul(builder.add(index, I64(number)), I64(LANES))
        return floats.load(scores, place, LANES)

    def find(index: ir.Value, held: list[ir.Value]) -> list[ir.Value]:
        return [_larger(builder, row(index, number), one) for number, one in enumerate(held)]

    _, found = loop(builder, I64(0), num_keys, 4, [before] * 4, find)
    top = _larger(builder, _larger(builder, *found[:2]), _larger(builder, *found[2:]))
    factor = exponential_16(builder, builder.fsub(before, top))
    lowest, zero = constant(VECTOR, float("-inf")), constant(VECTOR, 0.0)

    def weigh(index: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
        both = []
        for number in range(2):
            score = row(index, number)
            weight = exponential_16(builder, builder.fsub(score, top))
            # The exponential ends above 0. What is no number stays visible.
            counts = builder.fcmp_unordered(">", score, lowest)
            both.append(builder.select(counts, weight, zero))
        place = builder.add(weights, builder.mul(index, I64(2 * LANES)))
        builder.store(paired_bits(builder, *both), machine.pointer(place, WIDE_BITS), align=4)
        return [builder.fadd(*one) for one in zip(sums, both, strict=True)]

    total = builder.fmul(floats.load(totals, I64(0), LANES), factor)
    _, sums = loop(builder, I64(0), num_keys, 2, [total, zero], weigh)
    for vector, place in ((top, highest), (builder.fadd(*sums), totals), (factor, factors)):
        floats.store(vector, place, I64(0))


@emitted()
def pack_columns(builder, first, second, num_first, num_second, size, target, stride):
    """Write two pages of 16 rows of bfloat16 as columns of 32 at a stride in bytes.

    `size`, of a row, is a multiple of 16. Rows of a page after its first `num_first` (`num_second`) become
    zeros.
    """
    machine, row_bytes = Machine(builder), builder.mul(size, I64(2))
    pages = ((first, num_first), (second, num_second))

    def sixteen(column: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
        across = builder.mul(column, I64(2))

        def held(start: ir.Value, count: ir.Value, row: int) -> ir.Value:
            place = builder.add(start, builder.add(builder.mul(row_bytes, I64(row)), across))
            halves = builder.load(machine.pointer(place, HALVES), align=2)
            is_there = builder.icmp_signed("<", I64(row), count)
            return builder.zext(builder.select(is_there, halves, constant(HALVES, 0)), WIDE_BITS)

        pairs = [
            builder.or_(held(*page, row), builder.shl(held(*page, row + 1), constant(WIDE_BITS, 16)))
            for page in pages
            for row in range(0, LANES, 2)
        ]
        for number, line in enumerate(transposed(builder, pairs)):
            place = builder.add(target, builder.mul(stride, builder.add(column, I64(number))))
            builder.store(line, machine.pointer(place, WIDE_BITS), align=4)
        return []

    loop(builder, I64(0), size, LANES, [], sixteen)


class _Row:
    """A row of which the first `seen` numbers count; the others become 0."""

    def __init__(self, builder: ir.IRBuilder, memory: Memory, seen: ir.Value, size: ir.Value) -> None:
        self._builder, self._memory, self._seen, self._size = builder, memory, seen, size

    def fold(
        self,
        addresses: list[ir.Value],
        carried: ir.Value,
        add: Callable[[list[ir.Value], ir.Value], ir.Value],
    ) -> ir.Value:
        """Carry a vector over what counts of one row or more; other lanes of the last step stay."""
        builder, memory = self._builder, self._memory

        def whole(index: ir.Value, held: list[ir.Value]) -> list[ir.Value]:
            return [add([memory.load(one, index, LANES) for one in addresses], held[0])]

        index, (total,) = loop(builder, I64(0), self._seen, LANES, [carried], whole)
        mask = lanes_below(builder, builder.sub(self._seen, index))
        vectors = [memory.load_some(one, index, mask) for one in addresses]
        return builder.select(mask, add(vectors, total), total)

    def write(
        self, addresses: list[ir.Value], target: ir.Value, make: Callable[[list[ir.Value]], ir.Value]
    ) -> None:
        """Write what is made of the numbers that count, and 0 for the others."""
        builder, memory = self._builder, self._memory

        def whole(index: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
            memory.store(make([memory.load(one, index, LANES) for one in addresses]), target, index)
            return []

        index, _ = loop(builder, I64(0), self._seen, LANES, [], whole)
        zero = constant(VECTOR, 0.0)
        counts, exists = (lanes_below(builder, builder.sub(end, index)) for end in (self._seen, self._size))
        made = make([memory.load_some(one, index, counts) for one in addresses])
        memory.store_some(builder.select(counts, made, zero), target, index, exists)

        def clear(index: ir.Value, lanes: int) -> None:
            memory.store(zero if lanes > 1 else F32(0.0), target, index)

        over(builder, builder.add(index, I64(LANES)), self._size, clear)


@emitted()
def softmax_row(builder, scores, seen, size, like):
    """Turn the first `seen` of a row's scores into weights that add up to 1, the others into 0."""
    row = _Row(builder, Memory(builder, is_bfloat16=is_bfloat16(like)), seen, size)

    def larger(found: list[ir.Value], highest: ir.Value) -> ir.Value:
        return _larger(builder, found[0], highest)

    lowest = constant(VECTOR, float("-inf"))
    highest = reduced(builder, row.fold([scores], lowest, larger), lambda a, b: _larger(builder, a, b))

    def power(found: list[ir.Value]) -> ir.Value:
        return exponential_16(builder, builder.fsub(found[0], highest))

    zero = constant(VECTOR, 0.0)
    total = sum_lanes(
        builder, row.fold([scores], zero, lambda found, total: builder.fadd(total, power(found)))
    )
    inverse = broadcast(builder, builder.fdiv(F32(1.0), total))
    row.write([scores], scores, lambda found: builder.fmul(power(found), inverse))


@emitted()
def softmax_row_backward(builder, gradient, weights, seen, size, like):
    """Turn the gradient of a row's weights into that of its scores, 0 beyond the first `seen`."""
    row = _Row(builder, Memory(builder, is_bfloat16=is_bfloat16(like)), seen, size)
    zero = constant(VECTOR, 0.0)
    found = row.fold(
        [gradient, weights], zero, lambda pair, total: multiply_add(builder, pair[0], pair[1], total)
    )
    total = broadcast(builder, sum_lanes(builder, found))
    row.write(
        [gradient, weights],
        gradient,
        lambda pair: builder.fmul(builder.fsub(pair[0], total), pair[1]),
    )
