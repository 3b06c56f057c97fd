"""The compiled laying out of low-rank updates as a step reads them, from float32."""

# numba reads the loops themselves and takes their types from the arguments.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

import numpy as np
from numba import carray

from luthier.modeling.kernels._language import (
    Kernel,
    at,
    at_float32,
    at_int64,
    narrow,
    number,
    open_table,
    share,
)
from luthier.modeling.kernels.served_rows import BLOCK

# Numbers of an update, laid out for serving and for training.
_NUM_FACTS = 9


@Kernel
def lay_low_ranks(data):
    """Write every update's `a` [R, K] with zero rows up to F, and `scale * b'` in blocks of columns."""
    table = open_table(data)
    num_updates = table[2]
    facts = carray(at_int64(table[3]), (num_updates, _NUM_FACTS))
    begin, end = share(table, num_updates)
    for i in range(begin, end):
        rank, filled, num_inputs, num_outputs = facts[i, 4], facts[i, 5], facts[i, 6], facts[i, 7]
        scale = number(facts[i, 8])
        num_blocks = (num_outputs + BLOCK - 1) // BLOCK
        a_RK = carray(at_float32(facts[i, 0]), (rank, num_inputs))
        b_OR = carray(at_float32(facts[i, 1]), (num_outputs, rank))
        a_FK = carray(at(facts[i, 2], data), (filled, num_inputs))
        blocks = carray(at(facts[i, 3], data), (num_blocks, filled, BLOCK))
        for r in range(rank):
            for k in range(num_inputs):
                a_FK[r, k] = narrow(a_RK[r, k], a_FK)
        for r in range(rank, filled):
            for k in range(num_inputs):
                a_FK[r, k] = narrow(np.float32(0.0), a_FK)
        for block in range(num_blocks):
            first = block * BLOCK
            num_meant = min(BLOCK, num_outputs - first)
            for r in range(filled):
                kept = num_meant if r < rank else 0
                for c in range(kept):
                    blocks[block, r, c] = narrow(b_OR[first + c, r] * scale, blocks)
                for c in range(kept, BLOCK):
                    blocks[block, r, c] = narrow(np.float32(0.0), blocks)


@Kernel
def widen_low_ranks(data):
    """Write every update's `a` [R, K], and `scale * b` [O, R] into columns of a wide weight."""
    table = open_table(data)
    num_updates = table[2]
    facts = carray(at_int64(table[3]), (num_updates, _NUM_FACTS))
    begin, end = share(table, num_updates)
    for i in range(begin, end):
        rank, num_inputs, num_outputs, width = facts[i, 4], facts[i, 5], facts[i, 6], facts[i, 7]
        scale = number(facts[i, 8])
        a_RK = carray(at_float32(facts[i, 0]), (rank, num_inputs))
        b_OR = carray(at_float32(facts[i, 1]), (num_outputs, rank))
        a_place_RK = carray(at(facts[i, 2], data), (rank, num_inputs))
        # Of its last row, too, only the first columns are the update's.
        b_place_OR = carray(at(facts[i, 3], data), (num_outputs, width))
        for r in range(rank):
            for k in range(num_inputs):
                a_place_RK[r, k] = narrow(a_RK[r, k], a_place_RK)
        for o in range(num_outputs):
            for r in range(rank):
                b_place_OR[o, r] = narrow(b_OR[o, r] * scale, b_place_OR)
