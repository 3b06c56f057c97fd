"""Compiled kernels that part and merge the heads of attention, forward and backward."""

# numba reads the loops themselves and takes their types from the arguments.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from numba import carray

from luthier.modeling.kernels._language import (
    Kernel,
    at,
    at_float32,
    narrow,
    number,
    open_table,
    share,
    wide,
)


@Kernel
def split_heads(data):
    """Turn queries and keys by their positions and lay all three out as the products want them.

    query [pairs, groups * T, C], times `scale`; key and value [pairs, start + T, C] from row `start` on;
    a pair is a row of the batch and a key head.
    """
    table = open_table(data)
    num_pairs, num_kv_heads, groups, num_tokens, half = table[2], table[3], table[4], table[5], table[6]
    start, scale, size = table[7], number(table[8]), 2 * table[6]
    num_heads = groups * num_kv_heads
    shape = (num_pairs // num_kv_heads * num_tokens, (num_heads + 2 * num_kv_heads) * size)
    qkv_NE = carray(at(table[9], data), shape)
    cosine_TC = carray(at_float32(table[10]), (num_tokens, half))
    sine_TC = carray(at_float32(table[11]), (num_tokens, half))
    query = carray(at(table[12], data), (num_pairs, groups * num_tokens, size))
    key = carray(at(table[13], data), (num_pairs, start + num_tokens, size))
    value = carray(at(table[14], data), (num_pairs, start + num_tokens, size))
    begin_pair, end_pair = share(table, num_pairs)
    for pair in range(begin_pair, end_pair):
        row, head = pair // num_kv_heads, pair % num_kv_heads
        for t in range(num_tokens):
            n = row * num_tokens + t
            for group in range(groups):
                begin = (head * groups + group) * size
                q = group * num_tokens + t
                for c in range(half):
                    first, second = wide(qkv_NE[n, begin + c]), wide(qkv_NE[n, begin + half + c])
                    cosine, sine = cosine_TC[t, c], sine_TC[t, c]
                    query[pair, q, c] = narrow((first * cosine - second * sine) * scale, query)
                    query[pair, q, half + c] = narrow((second * cosine + first * sine) * scale, query)
            begin = (num_heads + head) * size
            for c in range(half):
                first, second = wide(qkv_NE[n, begin + c]), wide(qkv_NE[n, begin + half + c])
                cosine, sine = cosine_TC[t, c], sine_TC[t, c]
                key[pair, start + t, c] = narrow(first * cosine - second * sine, key)
                key[pair, start + t, half + c] = narrow(second * cosine + first * sine, key)
            begin = (num_heads + num_kv_heads + head) * size
            for c in range(size):
                value[pair, start + t, c] = qkv_NE[n, begin + c]


@Kernel
def split_heads_backward(data):
    """Write the gradient of the products' output from those of what `split_heads` wrote."""
    table = open_table(data)
    num_pairs, num_kv_heads, groups, num_tokens, half = table[2], table[3], table[4], table[5], table[6]
    start, scale, size = table[7], number(table[8]), 2 * table[6]
    num_heads = groups * num_kv_heads
    shape = (num_pairs // num_kv_heads * num_tokens, (num_heads + 2 * num_kv_heads) * size)
    out_NE = carray(at(table[9], data), shape)
    cosine_TC = carray(at_float32(table[10]), (num_tokens, half))
    sine_TC = carray(at_float32(table[11]), (num_tokens, half))
    query = carray(at(table[12], data), (num_pairs, groups * num_tokens, size))
    key = carray(at(table[13], data), (num_pairs, start + num_tokens, size))
    value = carray(at(table[14], data), (num_pairs, start + num_tokens, size))
    begin_pair, end_pair = share(table, num_pairs)
    for pair in range(begin_pair, end_pair):
        row, head = pair // num_kv_heads, pair % num_kv_heads
        for t in range(num_tokens):
            n = row * num_tokens + t
            for group in range(groups):
                begin = (head * groups + group) * size
                q = group * num_tokens + t
                for c in range(half):
                    first, second = wide(query[pair, q, c]) * scale, wide(query[pair, q, half + c]) * scale
                    cosine, sine = cosine_TC[t, c], sine_TC[t, c]
                    out_NE[n, begin + c] = narrow(first * cosine + second * sine, out_NE)
                    out_NE[n, begin + half + c] = narrow(second * cosine - first * sine, out_NE)
            begin = (num_heads + head) * size
            for c in range(half):
                first, second = wide(key[pair, start + t, c]), wide(key[pair, start + t, half + c])
                cosine, sine = cosine_TC[t, c], sine_TC[t, c]
                out_NE[n, begin + c] = narrow(first * cosine + second * sine, out_NE)
                out_NE[n, begin + half + c] = narrow(second * cosine - first * sine, out_NE)
            begin = (num_heads + num_kv_heads + head) * size
            for c in range(size):
                out_NE[n, begin + c] = value[pair, start + t, c]


@Kernel
def merge_heads(data):
    """Write [pairs, groups * T, C] as rows of tokens into the first columns of out."""
    table = open_table(data)
    num_pairs, num_kv_heads, groups, num_tokens, size = table[2], table[3], table[4], table[5], table[6]
    attended = carray(at(table[8], data), (num_pairs, groups * num_tokens, size))
    out_NK = carray(at(table[9], data), (num_pairs // num_kv_heads * num_tokens, table[7]))
    begin_pair, end_pair = share(table, num_pairs)
    for pair in range(begin_pair, end_pair):
        row, head = pair // num_kv_heads, pair % num_kv_heads
        for group in range(groups):
            begin = (head * groups + group) * size
            for t in range(num_tokens):
                for c in range(size):
                    out_NK[row * num_tokens + t, begin + c] = attended[pair, group * num_tokens + t, c]


@Kernel
def merge_heads_backward(data):
    """Write the gradient of [pairs, groups * T, C] from that of the rows of tokens."""
    table = open_table(data)
    num_pairs, num_kv_heads, groups, num_tokens, size = table[2], table[3], table[4], table[5], table[6]
    out = carray(at(table[8], data), (num_pairs, groups * num_tokens, size))
    gradient_NK = carray(at(table[9], data), (num_pairs // num_kv_heads * num_tokens, table[7]))
    begin_pair, end_pair = share(table, num_pairs)
    for pair in range(begin_pair, end_pair):
        row, head = pair // num_kv_heads, pair % num_kv_heads
        for group in range(groups):
            begin = (head * groups + group) * size
            for t in range(num_tokens):
                for c in range(size):
                    out[pair, group * num_tokens + t, c] = gradient_NK[row * num_tokens + t, begin + c]
