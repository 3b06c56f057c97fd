"""Compiled kernels that part and merge the heads of attention, forward and backward."""

# numba reads the loops themselves and takes their types from the arguments.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from luthier_cpu.codegen.memory_access import item_size
from luthier_cpu.codegen.numba_kernel import Kernel, number, open_table, share
from luthier_cpu.decode.kernels.head_rows import copy_row, turn_row, turn_row_back


@Kernel
def split_heads(data):
    """Turn queries and keys by their positions and lay all three out as the products want them.

    query [pairs, groups * T, C], times `scale`; key and value [pairs, start + T, C] from row `start` on;
    a pair is a row of the batch and a key head.
    """
    table = open_table(data)
    num_pairs, num_kv_heads, groups, num_tokens, half = table[2], table[3], table[4], table[5], table[6]
    start, scale, size = table[7], number(table[8]), 2 * table[6]
    qkv, cosine, sine, query, key, value = table[9], table[10], table[11], table[12], table[13], table[14]
    num_heads, head_bytes = groups * num_kv_heads, size * item_size(data)
    begin_pair, end_pair = share(table, num_pairs)
    for pair in range(begin_pair, end_pair):
        row, head = pair // num_kv_heads, pair % num_kv_heads
        for t in range(num_tokens):
            token = qkv + (row * num_tokens + t) * (num_heads + 2 * num_kv_heads) * head_bytes
            cosines, sines = cosine + t * half * 4, sine + t * half * 4
            for group in range(groups):
                source = token + (head * groups + group) * head_bytes
                target = query + ((pair * groups + group) * num_tokens + t) * head_bytes
                turn_row(source, target, cosines, sines, half, scale, data)
            place = (pair * (start + num_tokens) + start + t) * head_bytes
            source = token + (num_heads + head) * head_bytes
            turn_row(source, key + place, cosines, sines, half, 1.0, data)
            copy_row(source + num_kv_heads * head_bytes, value + place, size, data)


@Kernel
def split_heads_backward(data):
    """Write the gradient of the products' output from those of what `split_heads` wrote."""
    table = open_table(data)
    num_pairs, num_kv_heads, groups, num_tokens, half = table[2], table[3], table[4], table[5], table[6]
    start, scale, size = table[7], number(table[8]), 2 * table[6]
    out, cosine, sine, query, key, value = table[9], table[10], table[11], table[12], table[13], table[14]
    num_heads, head_bytes = groups * num_kv_heads, size * item_size(data)
    begin_pair, end_pair = share(table, num_pairs)
    for pair in range(begin_pair, end_pair):
        row, head = pair // num_kv_heads, pair % num_kv_heads
        for t in range(num_tokens):
            token = out + (row * num_tokens + t) * (num_heads + 2 * num_kv_heads) * head_bytes
            cosines, sines = cosine + t * half * 4, sine + t * half * 4
            for group in range(groups):
                source = query + ((pair * groups + group) * num_tokens + t) * head_bytes
                target = token + (head * groups + group) * head_bytes
                turn_row_back(source, target, cosines, sines, half, scale, data)
            place = (pair * (start + num_tokens) + start + t) * head_bytes
            target = token + (num_heads + head) * head_bytes
            turn_row_back(key + place, target, cosines, sines, half, 1.0, data)
            copy_row(value + place, target + num_kv_heads * head_bytes, size, data)
