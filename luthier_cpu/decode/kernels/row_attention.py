"""Attention of rows of one token: turned queries, scores, and the sums of values.

Some queries share a key head and read its pages together. Products are those of bfloat16 pairs where the
processor has these (AVX-512 BF16) and a head's size fills whole lines, else float32's. All addresses are
int64.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types

from luthier_cpu.codegen.instructions import BITS, SUMS, Machine, takes_pairs
from luthier_cpu.codegen.memory_access import (
    I16,
    I32,
    I64,
    LANES,
    Body,
    Memory,
    broadcast,
    emitted,
    for_count,
    is_bfloat16,
    loop,
)
from luthier_cpu.codegen.vectors import emit_additions, emit_dots, sum_four
from luthier_cpu.decode.batch_layout import MAX_QUERIES
from luthier_cpu.decode.kernels.head_rows import emit_turn

_KEYS = 4
# Numbers of a line, and columns that are summed up together.
_LINE, _COLUMNS = 2 * LANES, 4 * LANES
_HALVES = ir.VectorType(I16, _LINE)
_ZERO = ir.Constant(SUMS, [0.0] * LANES)


def _emit_either(
    builder: ir.IRBuilder,
    like: Any,
    by_pairs: ir.Value,
    num_queries: ir.Value,
    *,
    paired: Callable[[int], None],
    widened: Callable[[int], None],
) -> None:
    """Emit both ways to multiply, for each number of queries; that by pairs only where it can be compiled."""

    def emit(way: Callable[[int], None]) -> None:
        for_count(builder, num_queries, MAX_QUERIES, way)

    if not takes_pairs(like):
        emit(widened)
        return
    with builder.if_else(by_pairs) as (are_paired, others):
        with are_paired:
            emit(paired)
        with others:
            emit(widened)


@emitted(by_pairs=types.boolean, scale=types.float32)
def turn_query(builder, by_pairs, source, target, cosine, sine, half, scale, like):
    """Write a query turned by its position, times a scale: as it is held if taken by pairs, else float32."""
    places = [source, target, cosine, sine, half, scale]
    rows, floats = (Memory(builder, is_bfloat16=own) for own in (is_bfloat16(like), False))
    with builder.if_else(by_pairs) as (are_paired, others):
        with are_paired:
            emit_turn(builder, places, rows, rows)
        with others:
            emit_turn(builder, places, rows, floats)


@emitted(by_pairs=types.boolean)
def score_keys(builder, by_pairs, num_queries, keys, size, queries, out, stride, like):
    """Write the products of four keys with up to `MAX_QUERIES` queries, float32 [queries, 4].

    Queries are bfloat16 by pairs, else float32; `stride` counts float32 numbers from one's products to the
    next one's.
    """
    rows, floats = (Memory(builder, is_bfloat16=own) for own in (is_bfloat16(like), False))
    places = (keys, size, queries, size, size, out, stride)
    _emit_either(
        builder,
        like,
        by_pairs,
        num_queries,
        paired=lambda number: _emit_scores(builder, number, keys, size, queries, out, stride),
        widened=lambda number: emit_dots(builder, places, number, rows, floats),
    )


def _emit_scores(
    builder: ir.IRBuilder,
    num_queries: int,
    keys: ir.Value,
    size: ir.Value,
    queries: ir.Value,
    out: ir.Value,
    stride: ir.Value,
) -> None:
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
        own = sums[_KEYS * query : _KEYS * (query + 1)]
        floats.store(sum_four(builder, own), out, builder.mul(stride, I64(query)))


@emitted(by_pairs=types.boolean)
def add_values(builder, by_pairs, num_queries, values, size, weights, stride, num_values, totals, like):
    """Add values, times the weights of up to `MAX_QUERIES` queries, to totals, float32 [queries, size].

    Weights are bfloat16 by pairs, else float32; `stride` counts float32 numbers from one query's to the next
    one's.
    """
    rows = Memory(builder, is_bfloat16=is_bfloat16(like))
    places = (values, size, weights, stride, num_values, totals, size, size)
    _emit_either(
        builder,
        like,
        by_pairs,
        num_queries,
        paired=lambda number: _emit_sums(builder, number, places[:6]),
        widened=lambda number: emit_additions(builder, places, number, rows),
    )


def _emit_sums(builder: ir.IRBuilder, num_queries: int, places: tuple[ir.Value, ...]) -> None:
    values, size, weights, stride, num_values, totals = places
    row_bytes, last = builder.mul(size, I64(2)), builder.sub(num_values, I64(1))
    machine, floats = Machine(builder), Memory(builder, is_bfloat16=False)
    starts = [builder.add(weights, builder.mul(stride, I64(4 * query))) for query in range(num_queries)]
    rows = [builder.add(totals, builder.mul(size, I64(4 * query))) for query in range(num_queries)]

    def columns(count: int) -> Body:
        def body(column: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
            def two_values(index: ir.Value, held: list[ir.Value]) -> list[ir.Value]:
                found, across = list(held), builder.mul(column, I64(2))
                second = builder.add(index, I64(1))
                # The last of an odd number is its own neighbour, without a weight: the memory behind it may
                # hold anything.
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
