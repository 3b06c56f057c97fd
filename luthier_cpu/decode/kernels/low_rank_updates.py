"""Low-rank updates and bottlenecks of rows by pairs of bfloat16 (AVX-512 BF16).

`dot_fours` is the way in: the products of a row with an adapter's rows. `add_pairs_to_row` and
`add_pairs_to_rows` are the way out, by a matrix [R, columns] that is stored in pairs of its rows,
[columns/64, R/2, 64, 2] (blocks.py): one instruction multiplies a pair of a row's numbers with 16 columns.
All addresses are int64, all strides bytes.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from typing import Any

from llvmlite import ir

from luthier_cpu.codegen.instructions import BITS, SUMS, Machine, takes_pairs
from luthier_cpu.codegen.memory_access import I64, LANES, Body, Memory, emitted, lanes_below, loop
from luthier_cpu.codegen.vectors import sum_four
from luthier_cpu.decode.blocks import BLOCK

# How far ahead of their use an adapter's numbers are asked for; measured.
_AHEAD = 2048
# Rows whose products are summed up together: of the way in an adapter's, of the way out a step's.
_FOUR = 4
_LINES = BLOCK // LANES
_ZERO = ir.Constant(SUMS, [0.0] * LANES)


@emitted()
def dot_fours(builder, first, num_rows, x, size, out, like):
    """Write the products of rows of bfloat16, stored one after the other, with x, as float32.

    Rows are a multiple of 4, their numbers one of 32. Nothing is emitted where kernels multiply no pairs.
    """
    if not takes_pairs(like):
        return
    machine, floats = Machine(builder), Memory(builder, is_bfloat16=False)
    row_bytes = builder.mul(size, I64(2))
    four_bytes = builder.mul(row_bytes, I64(_FOUR))

    def four_rows(row: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
        start = builder.add(first, builder.mul(row, row_bytes))
        starts = [
            machine.opaque(builder.add(start, builder.mul(row_bytes, I64(number)))) for number in range(_FOUR)
        ]
        # The four rows after these, in the order of memory.
        ahead = builder.add(start, four_bytes)

        def multiply(num_lines: int) -> Body:
            def body(index: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
                across, found = builder.mul(index, I64(2)), list(sums)
                for line in range(num_lines):
                    place = builder.add(across, I64(64 * line))
                    factor = builder.load(machine.pointer(builder.add(x, place), BITS), align=2)
                    for number, own in enumerate(starts):
                        which = _FOUR * line + number
                        behind = builder.add(builder.mul(across, I64(_FOUR)), I64(64 * which))
                        machine.prefetch_behind(builder.add(ahead, behind))
                        held = builder.load(machine.pointer(builder.add(own, place), BITS), align=2)
                        found[which] = machine.multiply_pairs(found[which], held, factor)
                return found

            return body

        index, sums = loop(builder, I64(0), size, 64, [_ZERO] * (2 * _FOUR), multiply(2))
        _, last = loop(builder, index, size, 32, sums[:_FOUR], multiply(1))
        whole = [builder.fadd(*both) for both in zip(last, sums[_FOUR:], strict=True)]
        floats.store(sum_four(builder, whole), out, row)
        return []

    loop(builder, I64(0), num_rows, _FOUR, [], four_rows)


def _additions(doc: str, *, is_alone: bool) -> Any:
    @emitted()
    def add(
        builder, blocks, num_ranks, x, x_stride, num_rows, out, out_stride, num_columns, factors, bias, like
    ):
        if not takes_pairs(like):
            return
        places = [blocks, num_ranks, x, x_stride, num_rows, out, out_stride, num_columns]
        sizes = (1,) if is_alone else (_FOUR, 1)
        zero = I64(0)
        with builder.if_else(builder.icmp_signed("!=", factors, zero)) as (are_scaled, others):
            with are_scaled:
                _emit_additions(builder, places, sizes, factors=factors, bias=None)
            with others, builder.if_else(builder.icmp_signed("!=", bias, zero)) as (are_moved, plain):
                with are_moved:
                    _emit_additions(builder, places, sizes, factors=None, bias=bias)
                with plain:
                    _emit_additions(builder, places, sizes, factors=None, bias=None)

    add.__doc__ = doc
    return add


_DOC = """Add the products of {rows} with a matrix in pairs to bfloat16 numbers.

`x` is [rows, R], bfloat16. Before them a bias, float32, is added where there is one, or the sums are
multiplied by factors, float32, where there are any; each is 0 for none.
"""
add_pairs_to_row = _additions(_DOC.format(rows="one row"), is_alone=True)
add_pairs_to_rows = _additions(_DOC.format(rows="rows"), is_alone=False)


def _emit_additions(
    builder: ir.IRBuilder,
    places: list[ir.Value],
    sizes: tuple[int, ...],
    *,
    factors: ir.Value | None,
    bias: ir.Value | None,
) -> None:
    """Emit all columns, a block of 64 after the other; all rows pass by while it is near."""
    blocks, num_ranks, x, x_stride, num_rows, out, out_stride, num_columns = places
    machine = Machine(builder)
    held, floats = Memory(builder, is_bfloat16=True), Memory(builder, is_bfloat16=False)

    def block(column: ir.Value, masks: list[ir.Value] | None) -> None:
        weights = builder.add(blocks, builder.mul(column, builder.mul(num_ranks, I64(2))))

        def load(memory: Memory, address: ir.Value, line: int) -> ir.Value:
            index = builder.add(column, I64(LANES * line))
            if masks is None:
                return memory.load(address, index, LANES)
            return memory.load_some(address, index, masks[line])

        def store(value: ir.Value, address: ir.Value, line: int) -> None:
            index = builder.add(column, I64(LANES * line))
            if masks is None:
                held.store(value, address, index)
            else:
                held.store_some(value, address, index, masks[line])

        def rows_together(size: int) -> Body:
            def body(row: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
                numbers = [builder.add(row, I64(number)) for number in range(size)]
                outs = [builder.add(out, builder.mul(out_stride, number)) for number in numbers]
                inputs = [builder.add(x, builder.mul(x_stride, number)) for number in numbers]
                sums = [load(held, own, line) for own in outs for line in range(_LINES)]
                if bias is not None:
                    shifts = [load(floats, bias, line) for line in range(_LINES)]
                    sums = [builder.fadd(one, shifts[at % _LINES]) for at, one in enumerate(sums)]
                sums = _emit_pairs(builder, machine, weights, num_ranks, inputs, sums)
                if factors is not None:
                    scales = [load(floats, factors, line) for line in range(_LINES)]
                    sums = [builder.fmul(one, scales[at % _LINES]) for at, one in enumerate(sums)]
                for at, one in enumerate(sums):
                    store(one, outs[at // _LINES], at % _LINES)
                return []

            return body

        row: ir.Value = I64(0)
        for size in sizes:
            row, _ = loop(builder, row, num_rows, size, [], rows_together(size))

    def whole(column: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
        block(column, None)
        return []

    column, _ = loop(builder, I64(0), num_columns, BLOCK, [], whole)
    count = builder.sub(num_columns, column)
    with builder.if_then(builder.icmp_signed(">", count, I64(0))):
        block(column, [lanes_below(builder, count, LANES * line) for line in range(_LINES)])


def _emit_pairs(
    builder: ir.IRBuilder,
    machine: Machine,
    weights: ir.Value,
    num_ranks: ir.Value,
    inputs: list[ir.Value],
    sums: list[ir.Value],
) -> list[ir.Value]:
    """Emit the products of rows' numbers with a block; the sums come line by line of each row.

    One row alone has a second set of sums, so that one product needn't wait for the last.
    """
    is_alone = len(inputs) == 1

    def pairs(index: ir.Value, held: list[ir.Value]) -> list[ir.Value]:
        found = list(held)
        for which in range(2):
            number = builder.add(builder.lshr(index, I64(1)), I64(which))
            place = builder.add(weights, builder.mul(number, I64(4 * BLOCK)))
            lines = [builder.add(place, I64(64 * line)) for line in range(_LINES)]
            columns = []
            for line in lines:
                if is_alone:
                    machine.prefetch_behind(builder.add(line, I64(_AHEAD)))
                columns.append(builder.load(machine.pointer(line, BITS), align=4))
            for row, start in enumerate(inputs):
                pair = machine.repeated(builder.add(start, builder.mul(number, I64(4))))
                for line, column in enumerate(columns):
                    own = row * _LINES + line + (which * _LINES if is_alone else 0)
                    found[own] = machine.multiply_pairs(found[own], pair, column)
        return found

    before = [*sums, *([_ZERO] * _LINES if is_alone else [])]
    _, after = loop(builder, I64(0), num_ranks, _FOUR, before, pairs)
    if is_alone:
        return [builder.fadd(*both) for both in zip(after[:_LINES], after[_LINES:], strict=True)]
    return after
