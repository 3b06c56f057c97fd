"""The compiled attention of chunks of tokens to all of their sequences so far, in pairs.

Keys are taken some at a time and the sums are rescaled as larger scores come (Milakov and Gimelshein 2018,
arXiv 1805.02867; Dao et al. 2022, arXiv 2205.14135), so nothing grows with the sequence. Queries are the
columns: a score tile has a key in each row, so the largest score and the sum of weights of 16 queries are
sums of rows. Key heads, and parts of a chunk's queries, are shared out among the threads.

Legend: C head size, Q queries of a block, 16.
"""

# numba reads the loops themselves and takes their types from the arguments.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

import numpy as np
from numba import carray

from luthier_cpu.codegen.instructions import LINE_BYTES, TILE_BYTES
from luthier_cpu.codegen.numba_kernel import (
    Kernel,
    at_float32,
    at_int64,
    inlined,
    number,
    open_table,
    share,
    thread_number,
)
from luthier_cpu.codegen.vectors import prefetch_lines_behind
from luthier_cpu.decode.batch_layout import ATTENTION_BLOCKS, ATTENTION_KEYS, PAGE_SIZE
from luthier_cpu.decode.kernels.head_rows import (
    copy_row,
    pack_columns,
    transpose_scaled,
    turn_row,
    weigh_columns,
)
from luthier_cpu.gemm.bf16_gemm import multiply_tile, multiply_tile_16_rows
from luthier_cpu.gemm.bf16_gemv import sums_of_panel
from luthier_cpu.gemm.panel_blocks import pack_pairs
from luthier_cpu.gemm.tile_shapes import TILE_INPUTS, TILE_ROWS

_QUERIES = 16
_LOWEST = np.float32(-np.inf)


@inlined
def _hide(scores, first_key, num_keys, last_keys):
    """Give keys that a query is not to see the lowest score; the first query sees the fewest."""
    for j in range(max(last_keys[0] + 1 - first_key, 0), num_keys):
        for q in range(_QUERIES):
            if first_key + j > last_keys[q]:
                scores[j * _QUERIES + q] = _LOWEST


@inlined
def _add_mixed(sums, factors, mixed, first, num_rows):
    """Add sums [rows, Q] to what was mixed before, times the factors."""
    for c in range(num_rows):
        for q in range(_QUERIES):
            place = first + c * _QUERIES + q
            mixed[place] = mixed[place] * factors[q] + sums[c * _QUERIES + q]


@inlined
def _mix(weights_at, turned_at, size, num_steps, factors, mixed, block, sums_at):
    """Mix the values by the weights of a block of queries, and add to what was mixed before."""
    sums = carray(at_float32(sums_at), 64 * _QUERIES)
    if size % 64 == 0:
        for first in range(0, size, 64):
            rows_at = turned_at + first * ATTENTION_KEYS * 2
            multiply_tile_16_rows(weights_at, rows_at, ATTENTION_KEYS * 2, num_steps, 64, sums_at)
            _add_mixed(sums, factors, mixed, (block * size + first) * _QUERIES, 64)
        return
    for first in range(0, size, 16):
        rows_at = turned_at + first * ATTENTION_KEYS * 2
        multiply_tile(weights_at, rows_at, ATTENTION_KEYS * 2, num_steps, TILE_ROWS, sums_at)
        _add_mixed(sums, factors, mixed, (block * size + first) * _QUERIES, 16)


@inlined
def _pack_queries(qkv_at, first_row, some, num_blocks, heads, tables, scale, room, last_keys, data):
    """Lay the queries of some blocks, and note the last key that each may see.

    Queries of a token stand side by side; those after a chunk's last repeat it. `room` is where the blocks
    go, and where one may be until then.
    """
    num_queries, position, head, num_columns, groups, size = heads
    queries_at, turned_at = room
    half = size // 2
    for block in range(num_blocks):
        for column in range(_QUERIES):
            place = block * _QUERIES + column
            query = min(some * _QUERIES + place, num_queries - 1)
            token, group = query // groups, query % groups
            last_keys[place] = position + token
            angle = last_keys[place] * half * 4
            source_at = qkv_at + ((first_row + token) * num_columns + (head * groups + group) * size) * 2
            target_at = turned_at + column * size * 2
            turn_row(source_at, target_at, tables[0] + angle, tables[1] + angle, half, scale, data)
        block_at = queries_at + block * size * _QUERIES * 2
        for first in range(0, size, TILE_INPUTS):
            pack_pairs(turned_at + first * 2, size * 2, _QUERIES, block_at + first * _QUERIES * 2, LINE_BYTES)


@inlined
def _begin_blocks(num_blocks, size, mixed, state_at):
    """Let nothing be mixed yet."""
    for place in range(num_blocks * size * _QUERIES):
        mixed[place] = np.float32(0.0)
    state = carray(at_float32(state_at), num_blocks * 2 * _QUERIES)
    for place in range(num_blocks * 2 * _QUERIES):
        is_highest = place // _QUERIES % 2 == 0
        state[place] = _LOWEST if is_highest else np.float32(0.0)


@inlined
def _ask_for_keys(key_pages, value_pages, own_pages, first_key, num_keys, head, size):
    """Ask for the keys and values that are next, of which the processor foresees nothing."""
    head_bytes = PAGE_SIZE * size * 2
    for key in range(first_key, min(first_key + ATTENTION_KEYS, num_keys), PAGE_SIZE):
        place = (own_pages[key // PAGE_SIZE] * head[1] + head[0]) * head_bytes
        prefetch_lines_behind(key_pages + place, head_bytes // 64)
        prefetch_lines_behind(value_pages + place, head_bytes // 64)


@inlined
def _pack_values(value_pages, own_pages, first_key, num_seen, num_steps, head, size, turned_at):
    """Lay the values of some keys as columns, zeros after the last; `head` is the key head and how many there
    are."""
    for step in range(num_steps):
        first_page = first_key // PAGE_SIZE + 2 * step
        num_left = num_seen - 2 * step * PAGE_SIZE
        first_at = value_pages + (own_pages[first_page] * head[1] + head[0]) * PAGE_SIZE * size * 2
        second_at = first_at
        if num_left > PAGE_SIZE:
            place = own_pages[first_page + 1] * head[1] + head[0]
            second_at = value_pages + place * PAGE_SIZE * size * 2
        pack_columns(
            first_at, second_at, num_left, num_left - PAGE_SIZE, size,
            turned_at + step * 2 * PAGE_SIZE * 2, ATTENTION_KEYS * 2,
        )  # fmt: skip


@inlined
def _score_block(
    key_pages, own_pages, first_key, num_pages, num_steps, head, size, queries_at, last_keys, scores_at
):
    """Score some keys for a block of queries; what a query is not to see scores lowest."""
    scores = carray(at_float32(scores_at), ATTENTION_KEYS * _QUERIES)
    for page in range(num_pages):
        place = own_pages[first_key // PAGE_SIZE + page] * head[1] + head[0]
        keys_at = key_pages + place * PAGE_SIZE * size * 2
        multiply_tile(
            queries_at, keys_at, size * 2, size // TILE_INPUTS, TILE_ROWS, scores_at + page * TILE_BYTES
        )
    if first_key + num_pages * PAGE_SIZE - 1 > last_keys[0]:
        _hide(scores, first_key, num_pages * PAGE_SIZE, last_keys)
    for place in range(num_pages * PAGE_SIZE * _QUERIES, num_steps * 32 * _QUERIES):
        scores[place] = _LOWEST


@inlined
def _write_mixed(mixed_at, state_at, some, num_blocks, heads, first_row, num_kv_heads, rows_at, out_at, data):
    """Write what the queries of some blocks mixed, by the sums of their weights.

    `rows_at` has room for a block's.
    """
    num_queries, _, head, _, groups, size = heads
    for block in range(num_blocks):
        totals_at = state_at + block * 128 + 64
        totals = carray(at_float32(totals_at), _QUERIES)
        for q in range(_QUERIES):
            totals[q] = np.float32(1.0) / totals[q]
        for first in range(0, size, 16):
            source_at = mixed_at + (block * size + first) * _QUERIES * 4
            transpose_scaled(source_at, totals_at, rows_at + first * 2, size * 2, data)
        begin = (some + block) * _QUERIES
        for query in range(begin, min(begin + _QUERIES, num_queries)):
            row = first_row + query // groups
            place = (row * num_kv_heads * groups + head * groups + query % groups) * size
            copy_row(rows_at + (query - begin) * size * 2, out_at + place * 2, size, data)


def floats_of_attention(size: int) -> int:
    """Return the float32 numbers that a thread needs for heads of a size, as `_share_out` parts them."""
    of_block = size * _QUERIES // 2 + size * _QUERIES + 2 * _QUERIES + 2 * _QUERIES
    of_key = _QUERIES + _QUERIES // 2 + size // 2
    return ATTENTION_BLOCKS * of_block + ATTENTION_KEYS * of_key + _QUERIES


@inlined
def _share_out(queries_at, size):
    """Return the places in a thread's memory of queries, sums, states, scores, weights, values, last keys."""
    mixed_at = queries_at + ATTENTION_BLOCKS * size * _QUERIES * 2
    state_at = mixed_at + ATTENTION_BLOCKS * size * _QUERIES * 4
    scores_at = state_at + ATTENTION_BLOCKS * 2 * _QUERIES * 4
    weights_at = scores_at + ATTENTION_KEYS * _QUERIES * 4
    turned_at = weights_at + ATTENTION_KEYS * _QUERIES * 2
    last_at = turned_at + ATTENTION_KEYS * size * 2
    return queries_at, mixed_at, state_at, scores_at, weights_at, turned_at, last_at


@Kernel
def prefill_attention(data):
    """Let the tokens of chunks [first row, tokens, first position] attend; keys are in their pages."""
    table = open_table(data)
    num_chunks, num_kv_heads, groups, size = table[2], table[3], table[4], table[5]
    scale, max_pages, num_parts, num_rows = number(table[6]), table[7], table[8], table[9]
    num_columns = (groups + 2) * num_kv_heads * size
    chunks = carray(at_int64(table[11]), (num_chunks, 3))
    pages_NW = carray(at_int64(table[12]), (num_rows, max_pages))
    tables, key_pages, value_pages = (table[13], table[14]), table[15], table[16]
    qkv_at, out_at = table[10], table[17]
    own_memory = table[18] + thread_number(table) * table[19] * 4
    queries_at, mixed_at, state_at, scores_at, weights_at, turned_at, last_at = _share_out(own_memory, size)
    query_bytes = size * _QUERIES * 2
    mixed = carray(at_float32(mixed_at), ATTENTION_BLOCKS * size * _QUERIES)
    last_keys = carray(at_int64(last_at), ATTENTION_BLOCKS * _QUERIES)
    factors_at = last_at + ATTENTION_BLOCKS * _QUERIES * 8
    factors = carray(at_float32(factors_at), _QUERIES)
    sums_at = sums_of_panel()
    begin, end = share(table, num_chunks * num_kv_heads * num_parts)
    for item in range(begin, end):
        part, head = item % num_parts, (item // num_parts % num_kv_heads, num_kv_heads)
        chunk = item // num_parts // num_kv_heads
        first_row, num_tokens, position = chunks[chunk, 0], chunks[chunk, 1], chunks[chunk, 2]
        heads = (num_tokens * groups, position, head[0], num_columns, groups, size)
        own_pages = pages_NW[first_row + num_tokens - 1]
        num_blocks = (num_tokens * groups + _QUERIES - 1) // _QUERIES
        first_block, last_block = num_blocks * part // num_parts, num_blocks * (part + 1) // num_parts
        for some in range(first_block, last_block, ATTENTION_BLOCKS):
            num_some = min(ATTENTION_BLOCKS, last_block - some)
            # Nothing is mixed yet, and there is room.
            room = (queries_at, mixed_at)
            _pack_queries(qkv_at, first_row, some, num_some, heads, tables, scale, room, last_keys, data)
            _begin_blocks(num_some, size, mixed, state_at)
            num_keys = last_keys[num_some * _QUERIES - 1] + 1
            for first_key in range(0, num_keys, ATTENTION_KEYS):
                num_seen = min(ATTENTION_KEYS, num_keys - first_key)
                num_pages = (num_seen + PAGE_SIZE - 1) // PAGE_SIZE
                # Whole tiles of weights: 32 keys.
                num_steps = (num_pages + 1) // 2
                next_key = first_key + ATTENTION_KEYS
                _ask_for_keys(key_pages, value_pages, own_pages, next_key, num_keys, head, size)
                _pack_values(value_pages, own_pages, first_key, num_seen, num_steps, head, size, turned_at)
                for block in range(num_some):
                    own_last = carray(at_int64(last_at + block * _QUERIES * 8), _QUERIES)
                    # Pages after the last query of a block are none of its own.
                    num_own = min(num_pages, (own_last[_QUERIES - 1] - first_key) // PAGE_SIZE + 1)
                    if num_own <= 0:
                        continue
                    own_steps = (num_own + 1) // 2
                    own_at = queries_at + block * query_bytes
                    _score_block(
                        key_pages,
                        own_pages,
                        first_key,
                        num_own,
                        own_steps,
                        head,
                        size,
                        own_at,
                        own_last,
                        scores_at,
                    )
                    own_state_at = state_at + block * 128
                    weigh_columns(
                        scores_at, own_steps * 32, own_state_at, own_state_at + 64, factors_at, weights_at
                    )
                    _mix(weights_at, turned_at, size, own_steps, factors, mixed, block, sums_at)
            # No query is scored any more.
            _write_mixed(
                mixed_at, state_at, some, num_some, heads, first_row, num_kv_heads, queries_at, out_at, data
            )
