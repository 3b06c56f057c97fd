"""Compiled kernels of a decode step: each row has one token, and maybe an adapter of its own.

A row's adapter is a table of int64 (served_rows.py says what stands where), 0 for none, so that rows of any
mix of adapters are one call. Rows, or pairs of a row and a key head, are shared out among the threads.
"""

# numba reads the loops themselves and takes their types from the arguments.
# ruff: noqa: ARG001
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

import math

import numpy as np
from numba import carray, types
from numba.extending import overload

from luthier.modeling.kernels._language import (
    Kernel,
    at,
    at_float32,
    at_int64,
    exponential,
    inlined,
    narrow,
    number,
    open_table,
    share,
    thread_number,
    wide,
)
from luthier.modeling.kernels._machine import HAS_PAIRS
from luthier.modeling.kernels._memory import item_size
from luthier.modeling.kernels._pairs import dot_pairs
from luthier.modeling.kernels._vectors import (
    add_rows,
    add_rows_to_1,
    add_rows_to_2,
    add_rows_to_3,
    add_rows_to_4,
    ask_for,
    dot_four_rows_with_1,
    dot_four_rows_with_2,
    dot_four_rows_with_3,
    dot_four_rows_with_4,
    dot_rows,
)
from luthier.modeling.kernels.products import TILE_INPUTS
from luthier.modeling.kernels.served_rows import BLOCK, MAX_QUERIES


@Kernel
def add_rms_norm(data):
    """Add the change to the stream where there is one, and write weight * x / rms(x) of the sum."""
    table = open_table(data)
    num_rows, size, epsilon, has_change = table[2], table[3], number(table[4]), table[5]
    stream_ND = carray(at(table[6], data), (num_rows, size))
    change_ND = carray(at(table[7], data), (num_rows, size))
    weight_D = carray(at(table[8], data), size)
    out_ND = carray(at(table[9], data), (num_rows, size))
    begin, end = share(table, num_rows)
    for i in range(begin, end):
        if has_change != 0:
            for j in range(size):
                stream_ND[i, j] = narrow(wide(stream_ND[i, j]) + wide(change_ND[i, j]), stream_ND)
        total = np.float32(0.0)
        for j in range(size):
            value = wide(stream_ND[i, j])
            total += value * value
        inverse = np.float32(1.0) / np.sqrt(total / np.float32(size) + epsilon)
        for j in range(size):
            unit = wide(narrow(wide(stream_ND[i, j]) * inverse, out_ND))
            out_ND[i, j] = narrow(unit * wide(weight_D[j]), out_ND)


@inlined
def _turn_into(first, cosine, sine, source, half, scale, target):
    """Write a head turned by its position, times a scale."""
    for c in range(half):
        low, high = wide(source[first + c]), wide(source[first + half + c])
        target[c] = narrow((low * cosine[c] - high * sine[c]) * scale, target)
        target[half + c] = narrow((high * cosine[c] + low * sine[c]) * scale, target)


@inlined
def _copy(first, source, target, size):
    for c in range(size):
        target[c] = source[first + c]


@inlined
def _to_weights(scores, num_keys):
    """Turn scores into weights: their softmax."""
    highest = scores[0]
    for j in range(num_keys):
        highest = scores[j] if scores[j] > highest else highest
    total = np.float32(0.0)
    for j in range(num_keys):
        scores[j] = exponential(scores[j] - highest)
        total += scores[j]
    inverse = np.float32(1.0) / total
    for j in range(num_keys):
        scores[j] *= inverse


@inlined
def _score_keys(num_queries, keys_at, size, queries_at, scores_at, scores_stride, data):
    """Write the products of four keys with up to `MAX_QUERIES` queries of a key head."""
    if num_queries == 1:
        dot_four_rows_with_1(keys_at, size, queries_at, size, size, scores_at, scores_stride, data)
    elif num_queries == 2:
        dot_four_rows_with_2(keys_at, size, queries_at, size, size, scores_at, scores_stride, data)
    elif num_queries == 3:
        dot_four_rows_with_3(keys_at, size, queries_at, size, size, scores_at, scores_stride, data)
    else:
        dot_four_rows_with_4(keys_at, size, queries_at, size, size, scores_at, scores_stride, data)


@inlined
def _score_page(
    num_queries, keys_at, num_keys, size, queries_at, scores_at, scores_stride, next_values, next_keys, data
):
    """Write the products of a page's keys with queries, and ask for as much of what is read next."""
    row_bytes = size * item_size(data)
    for four in range(0, num_keys, 4):
        offset = four * row_bytes
        ask_for(next_values + offset, row_bytes // 16)
        ask_for(next_keys + offset, row_bytes // 16)
        _score_keys(
            num_queries, keys_at + offset, size, queries_at, scores_at + 4 * four, scores_stride, data
        )


@inlined
def _add_values(num_queries, values_at, size, weights_at, weights_stride, num_values, totals_at, data):
    """Add the values of a page to the totals of up to `MAX_QUERIES` queries, each times its weights."""
    if num_queries == 1:
        add_rows_to_1(values_at, size, weights_at, weights_stride, num_values, totals_at, size, size, data)
    elif num_queries == 2:
        add_rows_to_2(values_at, size, weights_at, weights_stride, num_values, totals_at, size, size, data)
    elif num_queries == 3:
        add_rows_to_3(values_at, size, weights_at, weights_stride, num_values, totals_at, size, size, data)
    else:
        add_rows_to_4(values_at, size, weights_at, weights_stride, num_values, totals_at, size, size, data)


@inlined
def _place_of(pair, page, pages_MW, num_kv_heads, head_bytes):
    """Return how far behind all pages' begin the keys of a page lie, of a pair of a row and a key head."""
    return (pages_MW[pair // num_kv_heads, page] * num_kv_heads + pair % num_kv_heads) * head_bytes


@Kernel
def attend_pages(data):
    """Put each row's key and value into its page, or attend to all of the row's pages, or both.

    Pages are [pages, key heads, tokens of a page, C]; a row's are named in `pages_MW`, and its token is
    number `positions_M[i]` of its sequence. Rows of one sequence are put in one call and attend in another,
    for they see each other. Queries that share a key head read its pages together.
    """
    table = open_table(data)
    num_rows, num_kv_heads, groups, size = table[2], table[3], table[4], table[5]
    scale, page_size, max_pages = number(table[6]), table[7], table[8]
    num_columns = (groups + 2) * num_kv_heads * size
    half = size // 2
    qkv = carray(at(table[9], data), num_rows * num_columns)
    positions_M = carray(at_int64(table[10]), num_rows)
    pages_MW = carray(at_int64(table[13]), (num_rows, max_pages))
    key_pages, value_pages = table[14], table[15]
    out = carray(at(table[16], data), num_rows * groups * num_kv_heads * size)
    puts, attends, longest = table[19], table[20], table[21]
    queries_at = table[17] + thread_number(table) * table[18] * 4
    totals_at = queries_at + 4 * MAX_QUERIES * size
    weights_at = totals_at + 4 * MAX_QUERIES * size
    totals_C = carray(at_float32(totals_at), MAX_QUERIES * size)
    bytes_each, head_bytes = item_size(data), page_size * size * item_size(data)
    begin, end = share(table, num_rows * num_kv_heads)
    for pair in range(begin, end):
        i, head = pair // num_kv_heads, pair % num_kv_heads
        position = positions_M[i]
        cosine = carray(at_float32(table[11] + position * half * 4), half)
        sine = carray(at_float32(table[12] + position * half * 4), half)
        row = i * num_columns
        if puts != 0:
            place = _place_of(pair, position // page_size, pages_MW, num_kv_heads, head_bytes)
            place += position % page_size * size * bytes_each
            first = row + (groups * num_kv_heads + head) * size
            key = carray(at(key_pages + place, data), size)
            _turn_into(first, cosine, sine, qkv, half, np.float32(1.0), key)
            _copy(first + num_kv_heads * size, qkv, carray(at(value_pages + place, data), size), size)
        if attends == 0:
            continue
        num_keys = position + 1
        num_pages = (num_keys + page_size - 1) // page_size
        for group in range(0, groups, MAX_QUERIES):
            num_queries, first_query = min(MAX_QUERIES, groups - group), head * groups + group
            for which in range(num_queries):
                query = carray(at_float32(queries_at + 4 * which * size), size)
                _turn_into(row + (first_query + which) * size, cosine, sine, qkv, half, scale, query)
            for page in range(num_pages):
                place = _place_of(pair, page, pages_MW, num_kv_heads, head_bytes)
                # What is read next: these keys' values, and the next page's keys, or those of the next pair.
                is_last = page + 1 == num_pages
                next_pair, next_page = (min(pair + 1, end - 1), 0) if is_last else (pair, page + 1)
                next_place = _place_of(next_pair, next_page, pages_MW, num_kv_heads, head_bytes)
                _score_page(
                    num_queries, key_pages + place, min(page_size, num_keys - page * page_size), size,
                    queries_at, weights_at + page * page_size * 4, longest,
                    value_pages + place, key_pages + next_place, data,
                )  # fmt: skip
            for c in range(num_queries * size):
                totals_C[c] = np.float32(0.0)
            for which in range(num_queries):
                _to_weights(carray(at_float32(weights_at + 4 * which * longest), num_keys), num_keys)
            for page in range(num_pages):
                values_at = value_pages + _place_of(pair, page, pages_MW, num_kv_heads, head_bytes)
                num_seen = min(page_size, num_keys - page * page_size)
                factors_at = weights_at + page * page_size * 4
                _add_values(num_queries, values_at, size, factors_at, longest, num_seen, totals_at, data)
            first = (i * groups * num_kv_heads + first_query) * size
            for c in range(num_queries * size):
                out[first + c] = narrow(totals_C[c], out)


@inlined
def _widen(source_at, target_at, size, data):
    """Write numbers as float32."""
    source, target = carray(at(source_at, data), size), carray(at_float32(target_at), size)
    for j in range(size):
        target[j] = wide(source[j])


def dot_adapter_rows(first, num_rows, x_at, wide_at, size, out_at, data):
    """Write the products of rows with x, float32 numbers at out; `wide_at` has room for x in float32."""


@overload(dot_adapter_rows, inline="always")
def _dot_adapter_rows_overload(first, num_rows, x_at, wide_at, size, out_at, data):
    def widened(first, num_rows, x_at, wide_at, size, out_at, data):
        _widen(x_at, wide_at, size, data)
        dot_rows(first, num_rows, wide_at, size, out_at, data)

    def paired(first, num_rows, x_at, wide_at, size, out_at, data):
        if size % TILE_INPUTS == 0:
            dot_pairs(first, num_rows, x_at, size, out_at)
        else:
            _widen(x_at, wide_at, size, data)
            dot_rows(first, num_rows, wide_at, size, out_at, data)

    return paired if data.dtype == types.uint16 and HAS_PAIRS else widened


@inlined
def _add_blocks(blocks_at, factors_at, num_rows, out_at, size, data):
    """Add rows in blocks of `BLOCK` columns, each row times its factor."""
    block_bytes = num_rows * BLOCK * item_size(data)
    for block in range((size + BLOCK - 1) // BLOCK):
        begin = block * BLOCK
        first, num_columns = blocks_at + block * block_bytes, min(BLOCK, size - begin)
        add_rows(first, BLOCK, factors_at, num_rows, out_at + begin * 4, num_columns, data)


@Kernel
def add_low_rank(data):
    """Add `B (A x)` to the columns of each site, and multiply them by the site's factors where it has any."""
    table = open_table(data)
    num_rows, size, width, num_sites, first_entry = table[2], table[3], table[4], table[5], table[6]
    x_at, out_at = table[7], table[8]
    adapters = carray(at_int64(table[9]), num_rows)
    widths = carray(at_int64(table[10]), num_sites)
    wide_at = table[11] + thread_number(table) * table[12] * 4
    middle_at = wide_at + size * 4
    bytes_each = item_size(data)
    begin, end = share(table, num_rows)
    for i in range(begin, end):
        if adapters[i] == 0:
            continue
        entries = carray(at_int64(adapters[i] + first_entry * 8), num_sites * 4)
        column = 0
        for site in range(num_sites):
            num_outputs, rank = widths[site], entries[4 * site + 2]
            if rank != 0:
                out = carray(at(out_at + (i * width + column) * bytes_each, data), num_outputs)
                dot_adapter_rows(
                    entries[4 * site], rank, x_at + i * size * bytes_each, wide_at, size, middle_at, data
                )
                change_at = middle_at + rank * 4
                change = carray(at_float32(change_at), num_outputs)
                for j in range(num_outputs):
                    change[j] = wide(out[j])
                _add_blocks(entries[4 * site + 1], middle_at, rank, change_at, num_outputs, data)
                if entries[4 * site + 3] != 0:
                    factors = carray(at_float32(entries[4 * site + 3]), num_outputs)
                    for j in range(num_outputs):
                        change[j] *= factors[j]
                for j in range(num_outputs):
                    out[j] = narrow(change[j], out)
            column += num_outputs


@inlined
def _activate(x, kind):
    """Return the activation of a kind: 1 gelu, 2 relu, 3 silu, 4 tanh."""
    if kind == 1:
        return np.float32(0.5) * x * np.float32(1.0 + math.erf(x * np.float32(0.7071067811865476)))
    if kind == 2:
        return x if x > np.float32(0.0) else np.float32(0.0)
    if kind == 3:
        return x / (np.float32(1.0) + exponential(-x))
    return np.float32(math.tanh(x))


@Kernel
def add_bottleneck(data):
    """Add `up(act(down(x)))` to each row of out; x is the row itself, or in parallel the half's input."""
    table = open_table(data)
    num_rows, size, first_entry = table[2], table[3], table[4]
    input_at, out_at = table[5], table[6]
    adapters = carray(at_int64(table[7]), num_rows)
    wide_at = table[8] + thread_number(table) * table[9] * 4
    middle_at = wide_at + size * 4
    bytes_each = item_size(data)
    begin, end = share(table, num_rows)
    for i in range(begin, end):
        if adapters[i] == 0:
            continue
        entries = carray(at_int64(adapters[i] + first_entry * 8), 7)
        middle_size = entries[4]
        if middle_size == 0:
            continue
        out = carray(at(out_at + i * size * bytes_each, data), size)
        x_at = (out_at if entries[6] == 0 else input_at) + i * size * bytes_each
        dot_adapter_rows(entries[0], middle_size, x_at, wide_at, size, middle_at, data)
        middle = carray(at_float32(middle_at), middle_size)
        down_bias = carray(at_float32(entries[1]), middle_size)
        for j in range(middle_size):
            middle[j] = _activate(middle[j] + down_bias[j], entries[5])
        change_at = middle_at + middle_size * 4
        change, up_bias = carray(at_float32(change_at), size), carray(at_float32(entries[3]), size)
        for j in range(size):
            change[j] = wide(out[j]) + up_bias[j]
        _add_blocks(entries[2], middle_at, middle_size, change_at, size, data)
        for j in range(size):
            out[j] = narrow(change[j], out)
