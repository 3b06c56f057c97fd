"""Compiled choices of a token of each row: the likeliest, and one drawn by its probability."""

# What an intrinsic takes is in its arguments, which only the generated code reads; numba reads the loops.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

import numpy as np
from llvmlite import ir
from numba import carray, types

from luthier_cpu.codegen.memory_access import (
    F32,
    I16,
    I32,
    I64,
    LANES,
    VECTOR,
    WIDE_BITS,
    Body,
    Memory,
    broadcast,
    constant,
    emitted,
    is_bfloat16,
    item_size,
    loop,
    reduced,
    sum_lanes,
)
from luthier_cpu.codegen.numba_kernel import (
    EXP_LOWEST,
    Kernel,
    at,
    at_float32,
    at_float64,
    at_int64,
    exponential,
    inlined,
    open_table,
    share,
    wide,
)
from luthier_cpu.decode.kernels.head_rows import exponential_16
from luthier_cpu.decode.sampling import BLOCK, LEAST_LIKELY


@emitted()
def _place_of_largest(builder, first, size, like):
    """Return where the largest of some numbers is, the first of equal ones; -1 where one is NaN, or the
    largest not finite."""
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
    highest = reduced(builder, largest_16, lambda a, b: builder.select(builder.fcmp_ordered(">", a, b), a, b))
    largest = builder.extract_element(highest, I32(0))
    is_bad = builder.icmp_unsigned("!=", builder.bitcast(is_bad_16, I16), I16(0))
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
    lowest = reduced(builder, places, lambda a, b: builder.select(builder.icmp_signed("<", a, b), a, b))
    place = builder.extract_element(lowest, I32(0))
    _, (place,) = loop(builder, index, size, 1, [place], seek(1))
    is_finite = builder.fcmp_ordered("<", largest, F32(float("inf")))
    is_finite = builder.and_(is_finite, builder.fcmp_ordered(">", largest, F32(infinite)))
    is_good = builder.and_(is_finite, builder.not_(is_bad))
    return builder.select(is_good, builder.sext(place, I64), I64(-1))


@Kernel
def find_best(data):
    """Write where each row's largest number is, the first of equal ones, or `sampling.UNSOUND`."""
    table = open_table(data)
    num_rows, size, logits_at = table[2], table[3], table[4]
    best_R = carray(at_int64(table[5]), num_rows)
    begin, end = share(table, num_rows)
    for i in range(begin, end):
        best_R[i] = _place_of_largest(logits_at + i * size * item_size(data), size, data)


@emitted(types.float32, largest=types.float32, inverse=types.float32)
def _mass_of_16s(builder, first, size, largest, inverse, like):
    """Return the sum of e to (x - largest) * inverse over some numbers, a multiple of 16, as float32."""
    numbers = Memory(builder, is_bfloat16=is_bfloat16(like))
    largest, inverse = broadcast(builder, largest), broadcast(builder, inverse)

    def add(index: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
        below = builder.fsub(numbers.load(first, index, LANES), largest)
        return [builder.fadd(sums[0], exponential_16(builder, builder.fmul(below, inverse)))]

    _, (total,) = loop(builder, I64(0), size, LANES, [constant(VECTOR, 0.0)], add)
    return sum_lanes(builder, total)


@inlined
def _mass_of_one(x, largest, inverse):
    """Return the same of one number, and 0 where it is too small for a float32."""
    scaled = (x - largest) * inverse
    return exponential(scaled) if scaled > np.float32(EXP_LOWEST) else np.float32(0.0)


@inlined
def _add_up_blocks(row_at, size, largest, inverse, masses_K, data):
    """Write the mass of each block of a row's numbers and return that of all."""
    total = 0.0
    row_V = carray(at(row_at, data), size)
    for block in range(len(masses_K)):
        first = block * BLOCK
        num_inside = min(BLOCK, size - first)
        whole = num_inside // 16 * 16
        mass = np.float64(_mass_of_16s(row_at + first * item_size(data), whole, largest, inverse, data))
        for j in range(first + whole, first + num_inside):
            mass += _mass_of_one(wide(row_V[j]), largest, inverse)
        masses_K[block] = mass
        total += mass
    return total


@inlined
def _find_point(row_V, sought, largest, inverse, masses_K, best):
    """Return the number at which the mass up to it, in order, passes the one that is sought."""
    before, block = 0.0, 0
    while block < len(masses_K) - 1 and before + masses_K[block] <= sought:
        before += masses_K[block]
        block += 1
    # Rounding may leave the point behind the block's last number: then it is that one.
    found = best
    for j in range(block * BLOCK, min((block + 1) * BLOCK, len(row_V))):
        mass = np.float64(_mass_of_one(wide(row_V[j]), largest, inverse))
        if mass > 0.0:
            found = j
            before += mass
            if before > sought:
                break
    return found


@inlined
def _gather_likely(row_V, largest, inverse, masses_K, ids_C, mass_C):
    """List the numbers that are likely at all, and their masses; return how many, -1 where too many."""
    count = 0
    for block in range(len(masses_K)):
        if masses_K[block] <= LEAST_LIKELY:
            continue
        for j in range(block * BLOCK, min((block + 1) * BLOCK, len(row_V))):
            mass = _mass_of_one(wide(row_V[j]), largest, inverse)
            if mass > np.float32(LEAST_LIKELY):
                if count == len(ids_C):
                    return -1
                ids_C[count], mass_C[count] = j, mass
                count += 1
    return count


@inlined
def _sink(place, count, ids_C, mass_C):
    """Let an entry of a heap sink until none below it comes before it: a larger mass, of equals the first."""
    while 2 * place + 1 < count:
        below = 2 * place + 1
        other = below + 1
        if other < count and (
            mass_C[other] > mass_C[below] or (mass_C[other] == mass_C[below] and ids_C[other] < ids_C[below])
        ):
            below = other
        if mass_C[place] > mass_C[below] or (mass_C[place] == mass_C[below] and ids_C[place] < ids_C[below]):
            return
        ids_C[place], ids_C[below] = ids_C[below], ids_C[place]
        mass_C[place], mass_C[below] = mass_C[below], mass_C[place]
        place = below


@inlined
def _draw_nucleus(count, needed, point, ids_C, mass_C):
    """Draw from the fewest likeliest whose mass reaches what is needed; -1 where all together do not."""
    for place in range(count // 2 - 1, -1, -1):
        _sink(place, count, ids_C, mass_C)
    # The likeliest are put behind what is left of the heap.
    kept, left = 0.0, count
    while left > 0 and (kept < needed or left == count):
        left -= 1
        ids_C[0], ids_C[left] = ids_C[left], ids_C[0]
        mass_C[0], mass_C[left] = mass_C[left], mass_C[0]
        kept += mass_C[left]
        _sink(0, left, ids_C, mass_C)
    if kept < needed:
        return -1
    sought, before, place = point * kept, 0.0, count
    while place > left:
        place -= 1
        before += mass_C[place]
        if before > sought:
            break
    return ids_C[place]


@Kernel
def draw(data):
    """Draw a token of each row: the one at which the mass up to it passes a point, a share of the whole.

    Rows are named, and come with their likeliest token, the inverse of a temperature, a point, and the share
    of the mass that the likeliest tokens reach which it is drawn from; 1 is all, in the vocabulary's order.
    There is room for the masses of a row's blocks, and for likely tokens and their masses. -1 is written
    where this is too little.
    """
    table = open_table(data)
    num_rows, size, logits_at = table[2], table[3], table[4]
    rows_M, best_M = carray(at_int64(table[5]), num_rows), carray(at_int64(table[6]), num_rows)
    inverse_M, point_M = carray(at_float32(table[7]), num_rows), carray(at_float64(table[8]), num_rows)
    share_M = carray(at_float64(table[9]), num_rows)
    drawn_M = carray(at_int64(table[10]), num_rows)
    num_blocks, most_likely = (size + BLOCK - 1) // BLOCK, table[12]
    masses_MK = carray(at_float64(table[11]), (num_rows, num_blocks))
    ids_MC = carray(at_int64(table[13]), (num_rows, most_likely))
    mass_MC = carray(at_float32(table[14]), (num_rows, most_likely))
    begin, end = share(table, num_rows)
    for i in range(begin, end):
        row_at = logits_at + rows_M[i] * size * item_size(data)
        row_V = carray(at(row_at, data), size)
        largest, inverse = wide(row_V[best_M[i]]), inverse_M[i]
        total = _add_up_blocks(row_at, size, largest, inverse, masses_MK[i], data)
        if share_M[i] >= 1.0:
            drawn_M[i] = _find_point(row_V, point_M[i] * total, largest, inverse, masses_MK[i], best_M[i])
            continue
        count = _gather_likely(row_V, largest, inverse, masses_MK[i], ids_MC[i], mass_MC[i])
        drawn_M[i] = -1
        if count > 0:
            needed = share_M[i] * total
            drawn_M[i] = _draw_nucleus(count, needed, point_M[i], ids_MC[i], mass_MC[i])
