"""Products of vectors in memory, written in LLVM's vectors of 16 float32 over float32 or bfloat16 memory.

The compiler's own vectors stop at a conversion of bits in the middle of a sum; these keep the sums of four
rows, or of 64 columns, in registers and read each weight once. All addresses are int64, all strides count
numbers, and `like` is a kernel's typed pointer, which says what the rows hold.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from typing import Any

from llvmlite import ir
from numba import types

from luthier_cpu.codegen.instructions import Machine
from luthier_cpu.codegen.memory_access import (
    F32,
    I32,
    I64,
    LANES,
    VECTOR,
    Body,
    Memory,
    broadcast,
    emitted,
    is_bfloat16,
    lanes_below,
    loop,
    multiply_add,
    prefetch,
    reduced,
)

# Sums that are kept at a time: as many as hide the time that one multiplication takes.
_NUM_SUMS = 4
# How far ahead of their use rows are asked for, in numbers; measured.
_AHEAD = 1024


def sum_four(builder: ir.IRBuilder, vectors: list[ir.Value]) -> ir.Value:
    """Return the sums of the numbers of four vectors, as a vector of four."""

    def shuffled(a: ir.Value, b: ir.Value, lanes: list[int]) -> ir.Value:
        return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(lanes)), lanes))

    def halved(a: ir.Value, b: ir.Value, width: int) -> ir.Value:
        """Add the upper to the lower half of each part of `width` lanes; a's parts come before b's."""
        low = [start + lane for start in range(0, 2 * LANES, width) for lane in range(width // 2)]
        high = [lane + width // 2 for lane in low]
        return builder.fadd(shuffled(a, b, low), shuffled(a, b, high))

    first, second = halved(vectors[0], vectors[1], 16), halved(vectors[2], vectors[3], 16)
    parts = halved(first, second, 8)
    for step in (2, 1):
        others = [lane ^ step for lane in range(LANES)]
        parts = builder.fadd(parts, shuffled(parts, parts, others))
    return shuffled(parts, parts, [0, 4, 8, 12])


def emit_dots(
    builder: ir.IRBuilder, arguments: tuple[ir.Value, ...], num_others: int, rows: Memory, other: Memory
) -> None:
    """Emit the products of four rows with each of some vectors; each row is read once."""
    first, stride, x, x_stride, size, out, out_stride = arguments
    numbers, others = range(_NUM_SUMS), range(num_others)
    starts = [builder.mul(stride, I64(number)) for number in numbers]
    x_starts = [builder.mul(x_stride, I64(number)) for number in others]

    def multiply(lanes: int) -> Body:
        def body(index: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
            factors = [other.load(x, builder.add(start, index), lanes) for start in x_starts]
            places = [builder.add(start, index) for start in starts]
            if lanes > 1:
                # The rows after these, which follow them in memory.
                ahead = builder.mul(stride, I64(_NUM_SUMS))
                for place in places:
                    rows.prefetch(first, builder.add(place, ahead))
            held = [rows.load(first, place, lanes) for place in places]
            pairs = [(row, factor) for factor in factors for row in held]
            return [
                multiply_add(builder, row, factor, total)
                for (row, factor), total in zip(pairs, sums, strict=True)
            ]

        return body

    num_sums = _NUM_SUMS * num_others
    zeros = [ir.Constant(VECTOR, [0.0] * LANES)] * num_sums
    index, vectors = loop(builder, I64(0), size, LANES, zeros, multiply(LANES))
    _, rest = loop(builder, index, size, 1, [F32(0.0)] * num_sums, multiply(1))
    memory = Memory(builder, is_bfloat16=False)
    for which in others:
        own = slice(which * _NUM_SUMS, (which + 1) * _NUM_SUMS)
        total = sum_four(builder, vectors[own])
        for row, single in enumerate(rest[own]):
            both = builder.fadd(builder.extract_element(total, I32(row)), single)
            total = builder.insert_element(total, both, I32(row))
        memory.store(total, out, builder.mul(out_stride, I64(which)))


@emitted()
def dot_rows(builder, first, num_rows, x, size, out, like):
    """Write the products of rows, a multiple of 4 and stored one after the other, with x, float32."""
    rows, floats = (Memory(builder, is_bfloat16=own) for own in (is_bfloat16(like), False))
    row_bytes = builder.mul(size, I64(2 if is_bfloat16(like) else 4))

    def four(row: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
        start, target = (
            builder.add(first, builder.mul(row, row_bytes)),
            builder.add(out, builder.mul(row, I64(4))),
        )
        emit_dots(builder, (start, size, x, I64(0), size, target, I64(0)), 1, rows, floats)
        return []

    loop(builder, I64(0), num_rows, _NUM_SUMS, [], four)


def emit_additions(
    builder: ir.IRBuilder, arguments: tuple[ir.Value, ...], num_outs: int, rows: Memory
) -> None:
    """Emit the additions of rows, each times a factor, to each of some vectors; each row is read once."""
    first, stride, factors, factors_stride, num_rows, out, out_stride, size = arguments
    memory = Memory(builder, is_bfloat16=False)
    factor_starts = [builder.mul(factors_stride, I64(number)) for number in range(num_outs)]
    out_starts = [builder.mul(out_stride, I64(number)) for number in range(num_outs)]

    def columns(lanes: int, num_sums: int) -> Body:
        def body(column: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
            places = [builder.add(column, I64(lanes * number)) for number in range(num_sums)]
            outs = [builder.add(start, place) for start in out_starts for place in places]

            def row_body(row: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
                start = builder.mul(row, stride)
                if num_sums > 1:
                    ahead = builder.add(builder.add(start, column), I64(_AHEAD))
                    for line in range(0, num_sums, 2):
                        rows.prefetch(first, builder.add(ahead, I64(line * LANES)))
                held = [rows.load(first, builder.add(start, place), lanes) for place in places]
                found = [memory.load(factors, builder.add(start, row), 1) for start in factor_starts]
                if lanes > 1:
                    found = [broadcast(builder, factor) for factor in found]
                pairs = [(part, factor) for factor in found for part in held]
                return [
                    multiply_add(builder, part, factor, total)
                    for (part, factor), total in zip(pairs, sums, strict=True)
                ]

            before = [memory.load(out, place, lanes) for place in outs]
            _, sums = loop(builder, I64(0), num_rows, 1, before, row_body)
            for place, total in zip(outs, sums, strict=True):
                memory.store(total, out, place)
            return []

        return body

    index, _ = loop(builder, I64(0), size, _NUM_SUMS * LANES, [], columns(LANES, _NUM_SUMS))
    index, _ = loop(builder, index, size, LANES, [], columns(LANES, 1))
    loop(builder, index, size, 1, [], columns(1, 1))


@emitted()
def add_rows(builder, first, stride, factors, num_rows, out, size, like):
    """Add rows, each times its float32 factor, to the float32 numbers at out."""
    places = (first, stride, factors, I64(0), num_rows, out, I64(0), size)
    emit_additions(builder, places, 1, Memory(builder, is_bfloat16=is_bfloat16(like)))


@emitted(types.float32)
def highest_of(builder, numbers, count):
    """Return the highest of some float32 numbers, at least one; what is no number is passed over."""
    floats = Memory(builder, is_bfloat16=False)
    lowest = ir.Constant(VECTOR, [float("-inf")] * LANES)

    def higher(a: ir.Value, b: ir.Value) -> ir.Value:
        return builder.select(builder.fcmp_ordered(">", a, b), a, b)

    def step(index: ir.Value, held: list[ir.Value]) -> list[ir.Value]:
        return [higher(floats.load(numbers, index, LANES), held[0])]

    index, found = loop(builder, I64(0), count, LANES, [lowest], step)
    mask = lanes_below(builder, builder.sub(count, index))
    rest = builder.select(mask, floats.load_some(numbers, index, mask), lowest)
    highest = higher(rest, found[0])
    return builder.extract_element(reduced(builder, highest, higher), I32(0))


def _prefetching(*, is_nearest: bool) -> Any:
    @emitted()
    def ask(builder, place, num_lines):
        machine = Machine(builder)

        def one(line: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
            address = builder.add(place, builder.mul(line, I64(4 * LANES)))
            if is_nearest:
                prefetch(builder, machine.pointer(address))
            else:
                machine.prefetch_behind(address)
            return []

        loop(builder, I64(0), num_lines, 1, [], one)

    return ask


# Prefetch lines of memory, of 64 bytes: into the nearest cache, or into the second one what is read later.
prefetch_lines, prefetch_lines_behind = _prefetching(is_nearest=True), _prefetching(is_nearest=False)
