"""The compiled attention of a decode step: each row has one token, and pages of keys and values.

Pairs of a row and a key head are shared out among the threads, or whole rows where the table says so. In
bfloat16 products are those of pairs where the processor has these (decode/kernels/row_attention.py).
"""

# numba reads the loops themselves and takes their types from the arguments.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

import numpy as np
from numba import carray

from luthier_cpu.codegen.instructions import are_paired
from luthier_cpu.codegen.memory_access import LANES, item_size
from luthier_cpu.codegen.numba_kernel import (
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
)
from luthier_cpu.codegen.vectors import highest_of, prefetch_lines_behind
from luthier_cpu.decode.batch_layout import MAX_QUERIES
from luthier_cpu.decode.kernels.head_rows import copy_row, turn_row
from luthier_cpu.decode.kernels.row_attention import add_values, score_keys, turn_query
from luthier_cpu.gemm.bf16_gemm import round_lanes
from luthier_cpu.gemm.tile_shapes import TILE_INPUTS

# How far ahead of their use pages are prefetched; measured. The processor foresees nothing of what is in
# pages, and its nearest cache waits for too few lines at a time to have them come as fast as memory gives.
_AHEAD_BYTES = 1 << 16


@inlined
def _to_weights(scores_at, num_keys):
    """Turn scores into weights: their softmax."""
    scores = carray(at_float32(scores_at), num_keys)
    highest = highest_of(scores_at, num_keys)
    total = np.float32(0.0)
    for j in range(num_keys):
        scores[j] = exponential(scores[j] - highest)
        total += scores[j]
    inverse = np.float32(1.0) / total
    for j in range(num_keys):
        scores[j] *= inverse


@inlined
def _score_page(by_pairs, num_queries, keys_at, num_keys, size, queries_at, scores_at, scores_stride, data):
    """Write the products of a page's keys with queries."""
    row_bytes = size * item_size(data)
    for four in range(0, num_keys, 4):
        score_keys(
            by_pairs, num_queries, keys_at + four * row_bytes, size, queries_at, scores_at + 4 * four,
            scores_stride, data,
        )  # fmt: skip


@inlined
def _round_weights(weights_at, num_keys):
    """Round weights to bfloat16, in place."""
    # There is room behind those that are rounded with the last, and what is written there is not read.
    for j in range(0, num_keys, LANES):
        round_lanes(weights_at + 4 * j, weights_at + 2 * j)


@inlined
def _place_of(row, head, page, shape, pages_MW, data):
    """Return how far behind all pages' begin the keys of a row's page and a key head are, and their bytes."""
    num_kv_heads, size, page_size = shape
    head_bytes = page_size * size * item_size(data)
    return (pages_MW[row, page] * num_kv_heads + head) * head_bytes, head_bytes


@inlined
def _ask_ahead(ahead, last_pair, shape, positions_M, pages_MW, key_pages, value_pages, data):
    """Ask for the part of a page that `ahead` names, and return the one that is read after it.

    A part is a row, a key head, and which one of all its pages' keys, and then of all its pages' values.
    """
    row, head, part = ahead
    num_kv_heads, _, page_size = shape
    if row * num_kv_heads + head >= last_pair:
        return ahead
    num_pages = positions_M[row] // page_size + 1
    is_value = part >= num_pages
    page, pages = (part - num_pages, value_pages) if is_value else (part, key_pages)
    place, num_bytes = _place_of(row, head, page, shape, pages_MW, data)
    prefetch_lines_behind(pages + place, num_bytes // 64)
    if part + 1 < 2 * num_pages:
        return row, head, part + 1
    return (row, head + 1, 0) if head + 1 < num_kv_heads else (row + 1, 0, 0)


@inlined
def _attend(
    by_pairs, row, head, last_pair, num_queries, asks, ahead, shape, positions_M, pages_MW, key_pages,
    value_pages, room, data,
):  # fmt: skip
    """Let some turned queries of a row and a key head attend; their totals are float32.

    `shape` is key heads, head size and tokens of a page; `room` the queries, the totals and the weights, and
    numbers from one query's weights to the next one's. With every page that is read one is asked for, as
    `_ask_ahead` does, unless others of these queries have asked: return where that has come to.
    """
    _, size, page_size = shape
    queries_at, totals_at, weights_at, longest = room
    num_keys = positions_M[row] + 1
    num_pages = (num_keys + page_size - 1) // page_size
    for page in range(num_pages):
        if asks:
            ahead = _ask_ahead(ahead, last_pair, shape, positions_M, pages_MW, key_pages, value_pages, data)
        place, _ = _place_of(row, head, page, shape, pages_MW, data)
        num_seen = min(page_size, num_keys - page * page_size)
        scores_at = weights_at + page * page_size * 4
        _score_page(
            by_pairs, num_queries, key_pages + place, num_seen, size, queries_at, scores_at, longest, data
        )
    totals_C = carray(at_float32(totals_at), num_queries * size)
    for c in range(num_queries * size):
        totals_C[c] = np.float32(0.0)
    for which in range(num_queries):
        own_at = weights_at + 4 * which * longest
        _to_weights(own_at, num_keys)
        if by_pairs:
            _round_weights(own_at, num_keys)
    weight_bytes = item_size(data) if by_pairs else 4
    for page in range(num_pages):
        if asks:
            ahead = _ask_ahead(ahead, last_pair, shape, positions_M, pages_MW, key_pages, value_pages, data)
        place, _ = _place_of(row, head, page, shape, pages_MW, data)
        values_at, factors_at = value_pages + place, weights_at + page * page_size * weight_bytes
        num_seen = min(page_size, num_keys - page * page_size)
        add_values(by_pairs, num_queries, values_at, size, factors_at, longest, num_seen, totals_at, data)
    return ahead


@Kernel
def attend_pages(data):
    """Put each row's key and value into its page, or attend to all of the row's pages, or both.

    Pages are [pages, key heads, tokens of a page, C]; a row's are named in `pages_MW`, and its token is
    number `positions_M[i]` of its sequence. Rows of one sequence are put in one call and attend in another,
    for they see each other. Queries that share a key head read its pages together.
    """
    table = open_table(data)
    num_rows, num_kv_heads, groups, size = table[2], table[3], table[4], table[5]
    scale, page_size, max_pages, half = number(table[6]), table[7], table[8], table[5] // 2
    positions_M = carray(at_int64(table[10]), num_rows)
    pages_MW = carray(at_int64(table[13]), (num_rows, max_pages))
    key_pages, value_pages = table[14], table[15]
    out = carray(at(table[16], data), num_rows * groups * num_kv_heads * size)
    puts, attends, longest = table[19], table[20], table[21]
    queries_at = table[17] + thread_number(table) * table[18] * 4
    totals_at = queries_at + 4 * MAX_QUERIES * size
    weights_at = totals_at + 4 * MAX_QUERIES * size
    totals_C = carray(at_float32(totals_at), MAX_QUERIES * size)
    vector_bytes = size * item_size(data)
    by_pairs = are_paired(data) and size % TILE_INPUTS == 0
    query_bytes = vector_bytes if by_pairs else 4 * size
    shape, room = (num_kv_heads, size, page_size), (queries_at, totals_at, weights_at, longest)
    if table[22] != 0:
        first_row, last_row = share(table, num_rows)
        begin, end = first_row * num_kv_heads, last_row * num_kv_heads
    else:
        begin, end = share(table, num_rows * num_kv_heads)
    ahead = (begin // num_kv_heads, begin % num_kv_heads, 0)
    if attends != 0:
        for _ in range(_AHEAD_BYTES // (page_size * vector_bytes)):
            ahead = _ask_ahead(ahead, end, shape, positions_M, pages_MW, key_pages, value_pages, data)
    for pair in range(begin, end):
        i, head = pair // num_kv_heads, pair % num_kv_heads
        position = positions_M[i]
        cosine_at, sine_at = table[11] + position * half * 4, table[12] + position * half * 4
        row_at = table[9] + i * (groups + 2) * num_kv_heads * vector_bytes
        if puts != 0:
            place, _ = _place_of(i, head, position // page_size, shape, pages_MW, data)
            place += position % page_size * vector_bytes
            key_at = row_at + (groups * num_kv_heads + head) * vector_bytes
            turn_row(key_at, key_pages + place, cosine_at, sine_at, half, np.float32(1.0), data)
            copy_row(key_at + num_kv_heads * vector_bytes, value_pages + place, size, data)
        if attends == 0:
            continue
        for group in range(0, groups, MAX_QUERIES):
            num_queries, first = min(MAX_QUERIES, groups - group), head * groups + group
            for which in range(num_queries):
                query_at = row_at + (first + which) * vector_bytes
                target_at = queries_at + which * query_bytes
                turn_query(by_pairs, query_at, target_at, cosine_at, sine_at, half, scale, data)
            ahead = _attend(
                by_pairs, i, head, end, num_queries, group == 0, ahead, shape, positions_M, pages_MW,
                key_pages, value_pages, room, data,
            )  # fmt: skip
            first_out = (i * groups * num_kv_heads + first) * size
            for c in range(num_queries * size):
                out[first_out + c] = narrow(totals_C[c], out)
