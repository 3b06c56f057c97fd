"""Attention of rows of one token by pairs of bfloat16 (AVX-512 BF16): scores, and the sums of values.

Some queries share a key head and read its pages together. All addresses are int64, all strides bytes, and
keys, values, queries and weights are bfloat16.
"""

# What an intrinsic takes is in its arguments, which only the generated code reads.
# ruff: noqa: ARG001
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from luthier_cpu.codegen.instructions import BITS, SUMS, Machine
from luthier_cpu.codegen.memory_access import I16, I32, I64, LANES, Body, Memory, broadcast, loop
from luthier_cpu.codegen.vectors import sum_four

_KEYS = 4
# Numbers of a line, and columns that are summed up together.
_LINE, _COLUMNS = 2 * LANES, 4 * LANES
_HALVES = ir.VectorType(I16, _LINE)
_ZERO = ir.Constant(SUMS, [0.0] * LANES)


def _scores_of(num_queries: int) -> Any:
    @intrinsic
    def scores(_context, keys, size, queries, out, out_stride):
        """Write the products of four keys with each of some queries, float32 [queries, 4]."""

        def generate(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            keys, size, queries, out, out_stride = arguments
            machine, floats = Machine(builder), Memory(builder, is_bfloat16=False)
            row_bytes = builder.mul(size, I64(2))

            def rows(first: ir.Value, count: int) -> list[ir.Value]:
                return [builder.add(first, builder.mul(row_bytes, I64(row))) for row in range(count)]

            key_rows, query_rows = rows(keys, _KEYS), rows(queries, num_queries)

            def multiply(index: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
                across = builder.mul(index, I64(2))
                held, factors = (
                    [builder.load(machine.pointer(builder.add(row, across), BITS), align=2) for row in found]
                    for found in (key_rows, query_rows)
                )
                pairs = [(key, factor) for factor in factors for key in held]
                return [machine.multiply_pairs(total, *pair) for pair, total in zip(pairs, sums, strict=True)]

            _, sums = loop(builder, I64(0), size, _LINE, [_ZERO] * (_KEYS * num_queries), multiply)
            for query in range(num_queries):
                place = builder.add(out, builder.mul(out_stride, I64(query)))
                floats.store(sum_four(builder, sums[_KEYS * query : _KEYS * (query + 1)]), place, I64(0))
            return I64(0)

        return types.int64(*[types.int64] * 5), generate

    return scores


score_keys_with_1, score_keys_with_2, score_keys_with_3, score_keys_with_4 = map(_scores_of, range(1, 5))


def _sums_of(num_queries: int) -> Any:
    @intrinsic
    def sums(_context, values, size, weights, weights_stride, num_values, totals):
        """Add values, each times its weight for each of some queries, to totals, float32 [queries, size]."""

        def generate(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            values, size, weights, weights_stride, num_values, totals = arguments
            row_bytes, last = builder.mul(size, I64(2)), builder.sub(num_values, I64(1))
            machine, floats = Machine(builder), Memory(builder, is_bfloat16=False)
            starts = [builder.add(weights, builder.mul(weights_stride, I64(q))) for q in range(num_queries)]
            rows = [builder.add(totals, builder.mul(size, I64(4 * query))) for query in range(num_queries)]

            def columns(count: int) -> Body:
                def body(column: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
                    def two_values(index: ir.Value, held: list[ir.Value]) -> list[ir.Value]:
                        found, across = list(held), builder.mul(column, I64(2))
                        second = builder.add(index, I64(1))
                        # The last of an odd number is its own neighbour, without a weight: behind it may lie
                        # anything.
                        has_second = builder.icmp_signed("<=", second, last)
                        second = builder.select(has_second, second, last)
                        kept = broadcast(builder, builder.select(has_second, I32(-1), I32(0xFFFF)))
                        even, odd = (
                            builder.add(builder.add(values, across), builder.mul(row_bytes, number))
                            for number in (index, second)
                        )
                        lines = _interleaved(builder, machine, even, odd, count)
                        for query, start in enumerate(starts):
                            pair = machine.repeated(builder.add(start, builder.mul(index, I64(2))))
                            pair = builder.and_(pair, kept)
                            for which, line in enumerate(lines):
                                own = query * len(lines) + which
                                found[own] = machine.multiply_pairs(found[own], pair, line)
                        return found

                    places = [
                        (row, builder.add(column, I64(LANES * line)))
                        for row in rows
                        for line in range(count // LANES)
                    ]
                    before = [floats.load(*place, LANES) for place in places]
                    _, after = loop(builder, I64(0), builder.add(num_values, I64(1)), 2, before, two_values)
                    for one, place in zip(after, places, strict=True):
                        floats.store(one, *place)
                    return []

                return body

            index, _ = loop(builder, I64(0), size, _COLUMNS, [], columns(_COLUMNS))
            loop(builder, index, size, _LINE, [], columns(_LINE))
            return I64(0)

        return types.int64(*[types.int64] * 6), generate

    return sums


add_values_to_1, add_values_to_2, add_values_to_3, add_values_to_4 = map(_sums_of, range(1, 5))


def _interleaved(
    builder: ir.IRBuilder, machine: Machine, even: ir.Value, odd: ir.Value, count: int
) -> list[ir.Value]:
    """Return columns of two rows as lines of 16 pairs, in order."""
    lines = []
    for first in range(0, count, _LINE):
        held = [
            builder.load(machine.pointer(builder.add(row, I64(2 * first)), _HALVES), align=2)
            for row in (even, odd)
        ]
        for half in range(2):
            order = [LANES * half + place // 2 + place % 2 * _LINE for place in range(_LINE)]
            mixed = builder.shuffle_vector(*held, ir.Constant(ir.VectorType(I32, _LINE), order))
            lines.append(builder.bitcast(mixed, BITS))
    return lines
