"""The compiled search for the largest number of each row."""

# What an intrinsic takes is in its arguments, which only the generated code reads; numba reads the loops.
# ruff: noqa: ARG001
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from typing import Any

from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from luthier.modeling.kernels._language import Kernel, at_int64, open_table, share
from luthier.modeling.kernels._memory import (
    F32,
    I32,
    I64,
    LANES,
    VECTOR,
    WIDE_BITS,
    Body,
    Memory,
    broadcast,
    constant,
    is_bfloat16,
    item_size,
    loop,
)


@intrinsic
def _place_of_largest(_context, first, size, like):
    """Return where the largest of some numbers is, the first of equal ones; -1 where one is NaN, or the
    largest not finite."""

    def generate(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        first, size = arguments[:2]
        numbers = Memory(builder, is_bfloat16=is_bfloat16(like))

        def compare(lanes: int) -> Body:
            def body(index: ir.Value, held: list[ir.Value]) -> list[ir.Value]:
                largest, is_bad = held
                found = numbers.load(first, index, lanes)
                is_nan = builder.fcmp_unordered("uno", found, found)
                is_larger = builder.fcmp_ordered(">", found, largest)
                return [builder.select(is_larger, found, largest), builder.or_(is_bad, is_nan)]

            return body

        infinite, flag = float("-inf"), ir.IntType(1)
        flags = ir.VectorType(flag, LANES)
        start = [constant(VECTOR, infinite), ir.Constant(flags, [0] * LANES)]
        index, (largest_16, is_bad_16) = loop(builder, I64(0), size, LANES, start, compare(LANES))
        largest, is_bad = F32(infinite), flag(0)
        for lane in range(LANES):
            one = builder.extract_element(largest_16, I32(lane))
            largest = builder.select(builder.fcmp_ordered(">", one, largest), one, largest)
            is_bad = builder.or_(is_bad, builder.extract_element(is_bad_16, I32(lane)))
        _, (largest, is_bad) = loop(builder, index, size, 1, [largest, is_bad], compare(1))

        def seek(lanes: int) -> Body:
            def body(index: ir.Value, held: list[ir.Value]) -> list[ir.Value]:
                place = builder.trunc(index, I32)
                sought = largest
                if lanes > 1:
                    numbered = ir.Constant(WIDE_BITS, list(range(LANES)))
                    place = builder.add(broadcast(builder, place), numbered)
                    sought = broadcast(builder, largest)
                is_it = builder.fcmp_ordered("==", numbers.load(first, index, lanes), sought)
                is_first = builder.and_(is_it, builder.icmp_signed("<", place, held[0]))
                return [builder.select(is_first, place, held[0])]

            return body

        nowhere = 2**31 - 1
        index, (places,) = loop(builder, I64(0), size, LANES, [constant(WIDE_BITS, nowhere)], seek(LANES))
        place = I32(nowhere)
        for lane in range(LANES):
            one = builder.extract_element(places, I32(lane))
            place = builder.select(builder.icmp_signed("<", one, place), one, place)
        _, (place,) = loop(builder, index, size, 1, [place], seek(1))
        is_finite = builder.fcmp_ordered("<", largest, F32(float("inf")))
        is_finite = builder.and_(is_finite, builder.fcmp_ordered(">", largest, F32(infinite)))
        is_good = builder.and_(is_finite, builder.not_(is_bad))
        return builder.select(is_good, builder.sext(place, I64), I64(-1))

    return types.int64(types.int64, types.int64, like), generate


@Kernel
def find_best(data):
    """Write where each row's largest number is, the first of equal ones, or -1 (`find_best` of best.py)."""
    table = open_table(data)
    num_rows, size, logits_at = table[2], table[3], table[4]
    best_R = carray(at_int64(table[5]), num_rows)
    begin, end = share(table, num_rows)
    for i in range(begin, end):
        best_R[i] = _place_of_largest(logits_at + i * size * item_size(data), size, data)
