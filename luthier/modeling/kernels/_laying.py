"""The compiled laying out of low-rank updates as a step reads them, from float32."""

# numba reads the loops themselves and takes their types from the arguments.
# What an intrinsic takes is in its arguments, which only the generated code reads.
# ruff: noqa: ARG001
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic, overload

from luthier.modeling.kernels._language import ONE, Kernel, at, at_int64, narrow, open_table, share
from luthier.modeling.kernels._machine import BITS, Machine, takes_pairs
from luthier.modeling.kernels._memory import (
    I32,
    I64,
    LANES,
    VECTOR,
    WIDE_BITS,
    Memory,
    call,
    constant,
    is_bfloat16,
    item_size,
    lanes_below,
    loop,
    number_of_bits,
    row_starts,
    transposed,
)
from luthier.modeling.kernels._pairs import paired_bits
from luthier.modeling.kernels.blocks import BLOCK

# Numbers of an update, laid out for serving and for training.
_NUM_FACTS = 10
_INFINITE = 0x7F800000


def _add_wrong(builder: ir.IRBuilder, found: ir.Value, vector: ir.Value) -> ir.Value:
    """Return the lanes in which there was a number that is not finite, with those of one vector more."""
    exponents = constant(WIDE_BITS, _INFINITE)
    is_wrong = builder.icmp_signed(
        "==", builder.and_(builder.bitcast(vector, WIDE_BITS), exponents), exponents
    )
    return builder.or_(found, builder.zext(is_wrong, WIDE_BITS))


def _any_lane(builder: ir.IRBuilder, found: ir.Value) -> ir.Value:
    """Return 1 where there was one in any lane, else 0."""
    return builder.zext(call(builder, "llvm.vector.reduce.or.v16i32", I32, [found]), I64)


@intrinsic
def _copy_scaled(_context, like, source, count, scale, target):
    """Write float32 numbers, times a scale (the bits of a float32), as `like` holds them.

    The result is 1 where one of them is not finite, else 0.
    """

    def generate(_target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, source, count, scale, target = arguments
        floats = Memory(builder, is_bfloat16=False)
        held = Memory(builder, is_bfloat16=is_bfloat16(signature.args[0]))
        factor = number_of_bits(builder, scale)

        def copy(index: ir.Value, wrong: list[ir.Value]) -> list[ir.Value]:
            numbers = floats.load(source, index, LANES)
            held.store(builder.fmul(numbers, factor), target, index)
            return [_add_wrong(builder, wrong[0], numbers)]

        index, (wrong,) = loop(builder, I64(0), count, LANES, [constant(WIDE_BITS, 0)], copy)
        # Where there are none left nothing is read or written.
        mask = lanes_below(builder, builder.sub(count, index))
        last = floats.load_some(source, index, mask)
        held.store_some(builder.fmul(last, factor), target, index, mask)
        return _any_lane(builder, _add_wrong(builder, wrong, last))

    return types.int64(like, *[types.int64] * 4), generate


@intrinsic
def _turn_scaled(
    _context, like, source, stride, num_rows, num_numbers, num_written, scale, target, target_stride
):
    """Write up to 16 numbers of up to 16 rows of float32, times a scale, as `like` holds them: a row for each
    place in the source's rows, `num_written` of them, 16 numbers in each. What there is not are zeros.

    Where adapters lie in pairs two such rows are one of 16 pairs, and so far apart as two. The result is 1
    where a number is not finite, else 0.
    """

    def generate(_target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, stride, num_rows, num_numbers, num_written, scale, target, target_stride = arguments[1:]
        floats = Memory(builder, is_bfloat16=False)
        held = Memory(builder, is_bfloat16=is_bfloat16(signature.args[0]))
        factor = number_of_bits(builder, scale)
        rows, wrong = [], constant(WIDE_BITS, 0)
        for number, start in enumerate(row_starts(builder, source, stride, num_rows)):
            is_there = builder.icmp_signed("<", I64(number), num_rows)
            own_count = builder.select(is_there, num_numbers, I64(0))
            row = floats.load_some(start, I64(0), lanes_below(builder, own_count))
            wrong = _add_wrong(builder, wrong, row)
            rows.append(builder.bitcast(builder.fmul(row, factor), WIDE_BITS))
        columns = transposed(builder, rows)
        if takes_pairs(signature.args[0]):
            machine = Machine(builder)
            for number in range(0, LANES, 2):
                with builder.if_then(builder.icmp_signed("<", I64(number), num_written)):
                    place = builder.add(target, builder.mul(target_stride, I64(number)))
                    bits = paired_bits(builder, columns[number], columns[number + 1])
                    builder.store(bits, machine.pointer(place, BITS), align=4)
            return _any_lane(builder, wrong)
        for number, column in enumerate(columns):
            with builder.if_then(builder.icmp_signed("<", I64(number), num_written)):
                place = builder.add(target, builder.mul(target_stride, I64(number)))
                held.store(builder.bitcast(column, VECTOR), place, I64(0))
        return _any_lane(builder, wrong)

    return types.int64(like, *[types.int64] * 8), generate


def _columns_apart(data):
    """Return how many numbers a column is behind the one before it."""


@overload(_columns_apart, inline="always")
def _columns_apart_overload(data):
    apart = 2 if takes_pairs(data) else 1
    return lambda data: apart  # noqa: ARG005


@Kernel
def lay_low_ranks(data):
    """Write every update's `a` [R, K] with zero rows up to F, and `scale * b'` in blocks of columns.

    The last of an update's numbers is 1 afterwards where one of those that were read is not finite, else 0.
    """
    table = open_table(data)
    num_updates = table[2]
    facts = carray(at_int64(table[3]), (num_updates, _NUM_FACTS))
    size = item_size(data)
    begin, end = share(table, num_updates)
    for i in range(begin, end):
        rank, filled, num_inputs, num_outputs = facts[i, 4], facts[i, 5], facts[i, 6], facts[i, 7]
        a_at, b_at, target_at, blocks_at = facts[i, 0], facts[i, 1], facts[i, 2], facts[i, 3]
        wrong = 0
        for r in range(rank):
            own_at = target_at + r * num_inputs * size
            wrong |= _copy_scaled(data, a_at + r * num_inputs * 4, num_inputs, ONE, own_at)
        a_FK = carray(at(target_at, data), (filled, num_inputs))
        for r in range(rank, filled):
            for k in range(num_inputs):
                a_FK[r, k] = narrow(np.float32(0.0), a_FK)
        for column in range(0, (num_outputs + BLOCK - 1) // BLOCK * BLOCK, LANES):
            for first in range(0, filled, LANES):
                row = column // BLOCK * filled + first
                wrong |= _turn_scaled(
                    data,
                    b_at + (column * rank + first) * 4,
                    rank * 4,
                    num_outputs - column,
                    rank - first,
                    filled - first,
                    facts[i, 8],
                    blocks_at + (row * BLOCK + column % BLOCK * _columns_apart(data)) * size,
                    BLOCK * size,
                )
        facts[i, _NUM_FACTS - 1] = wrong


@Kernel
def widen_low_ranks(data):
    """Write every update's `a` [R, K], and `scale * b` [O, R] into columns of a wide weight."""
    table = open_table(data)
    num_updates = table[2]
    facts = carray(at_int64(table[3]), (num_updates, _NUM_FACTS))
    size = item_size(data)
    begin, end = share(table, num_updates)
    for i in range(begin, end):
        rank, num_inputs, num_outputs, width = facts[i, 4], facts[i, 5], facts[i, 6], facts[i, 7]
        a_at, b_at, a_target_at, b_target_at = facts[i, 0], facts[i, 1], facts[i, 2], facts[i, 3]
        for r in range(rank):
            row = r * num_inputs
            _copy_scaled(data, a_at + row * 4, num_inputs, ONE, a_target_at + row * size)
        # Of its rows only the first columns are the update's.
        for o in range(num_outputs):
            _copy_scaled(data, b_at + o * rank * 4, rank, facts[i, 8], b_target_at + o * width * size)
