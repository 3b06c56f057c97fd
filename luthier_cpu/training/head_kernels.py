"""Compiled kernels that split the heads of attention and turn them by their positions, and back."""

# numba reads the loops themselves and takes their types from the arguments.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from luthier_cpu.codegen.memory_access import item_size
from luthier_cpu.codegen.numba_kernel import Kernel, inlined, number, open_table, share
from luthier_cpu.decode.kernels.head_rows import copy_row, turn_row, turn_row_back


@inlined
def _places(table, pair, t, head_bytes):
    """Return where a token's first query, key and value are side by side, where by head, and its angles.

    From one query of a pair to the next there are `T` heads by head.
    """
    num_kv_heads, groups, num_tokens, half, start = table[3], table[4], table[5], table[6], table[7]
    row, head, num_heads = pair // num_kv_heads, pair % num_kv_heads, groups * num_kv_heads
    token = table[9] + (row * num_tokens + t) * (num_heads + 2 * num_kv_heads) * head_bytes
    key_at = token + (num_heads + head) * head_bytes
    beside = (token + head * groups * head_bytes, key_at, key_at + num_kv_heads * head_bytes)
    place = (pair * (start + num_tokens) + start + t) * head_bytes
    query_at = table[12] + (pair * groups * num_tokens + t) * head_bytes
    by_head = (query_at, table[13] + place, table[14] + place)
    return beside, by_head, (table[10] + t * half * 4, table[11] + t * half * 4)


@Kernel
def split_heads(data):
    """Turn queries and keys by their positions and write all three as the products want them.

    query [pairs, groups * T, C], times `scale`; key and value [pairs, start + T, C] from row `start` on;
    a pair is a row of the batch and a key head.
    """
    table = open_table(data)
    groups, num_tokens, half, scale, size = table[4], table[5], table[6], number(table[8]), 2 * table[6]
    head_bytes = size * item_size(data)
    begin_pair, end_pair = share(table, table[2])
    for pair in range(begin_pair, end_pair):
        for t in range(num_tokens):
            (query, key, value), (to_query, to_key, to_value), (cosines, sines) = _places(
                table, pair, t, head_bytes
            )
            for group in range(groups):
                target = to_query + group * num_tokens * head_bytes
                turn_row(query + group * head_bytes, target, cosines, sines, half, scale, data)
            turn_row(key, to_key, cosines, sines, half, 1.0, data)
            copy_row(value, to_value, size, data)


@Kernel
def split_heads_backward(data):
    """Write the gradient of the products' output from those of what `split_heads` wrote."""
    table = open_table(data)
    groups, num_tokens, half, scale, size = table[4], table[5], table[6], number(table[8]), 2 * table[6]
    head_bytes = size * item_size(data)
    begin_pair, end_pair = share(table, table[2])
    for pair in range(begin_pair, end_pair):
        for t in range(num_tokens):
            (to_query, to_key, to_value), (query, key, value), (cosines, sines) = _places(
                table, pair, t, head_bytes
            )
            for group in range(groups):
                source = query + group * num_tokens * head_bytes
                turn_row_back(source, to_query + group * head_bytes, cosines, sines, half, scale, data)
            turn_row_back(key, to_key, cosines, sines, half, 1.0, data)
            copy_row(value, to_value, size, data)
