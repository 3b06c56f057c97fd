"""The compiled attention of a training step's short rows, in pairs of bfloat16 by panels.

What attends together is a pair of a row and a key head: its queries are those of all query heads that share
the key head. Each of the six products is one over panels of 64 columns (gemm/panel_blocks.py): of keys where
numbers of a head are summed, of numbers of a head where keys or queries are. Pairs are shared out among the
threads. Legend as in training/attention.py; scores and weights have a width W, the keys filled up.
"""

# numba reads the loops themselves and takes their types from the arguments.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from luthier_cpu.codegen.numba_kernel import Kernel, inlined, open_scratch, open_table, share
from luthier_cpu.decode.kernels.head_rows import softmax_row, softmax_row_backward
from luthier_cpu.gemm.bf16_gemm import interleave
from luthier_cpu.gemm.panel_blocks import (
    finish_1_row_of_64,
    finish_6_rows_of_64,
    pack_pairs,
    pair_lines_of_64,
)
from luthier_cpu.training.pair_attention import COLUMNS, HEAD_BYTES, LINE_BYTES

_ROWS = 6
_TILE = 16
# Of the tables: where the threads' memory is, behind the tensors.
_SCRATCH, _SCRATCH_BACKWARD = 14, 17


@inlined
def _pack_columns(rows_at, num_rows, size, panel_at):
    """Lay rows of bfloat16 as a panel's columns, pairs of their own numbers."""
    for column in range(0, num_rows, _TILE):
        for pair in range(0, size // 2, _TILE):
            pack_pairs(
                rows_at + column * size * 2 + pair * 4,
                size * 2,
                min(_TILE, num_rows - column),
                panel_at + pair * LINE_BYTES + column * 4,
                LINE_BYTES,
            )


@inlined
def _pack_pairs_of_rows(rows_at, num_rows, size, num_columns, panel_at):
    """Lay columns of rows of bfloat16 as a panel's, pairs of two rows."""
    for pair in range((num_rows + 1) // 2):
        row_at = rows_at + 2 * pair * size * 2
        has_odd = 2 * pair + 1 < num_rows
        pair_lines_of_64(row_at, row_at + size * 2, num_columns, has_odd, panel_at + pair * LINE_BYTES)


@inlined
def _turn_rows(rows_at, num_rows, width, zeros_at, target_at):
    """Lay rows of bfloat16 as pairs of two rows, so that each column is a row of pairs."""
    for pair in range((num_rows + 1) // 2):
        even_at = rows_at + 2 * pair * width * 2
        for column in range(0, width, _TILE):
            odd_at = even_at + (width + column) * 2 if 2 * pair + 1 < num_rows else zeros_at
            interleave(even_at + column * 2, odd_at, target_at + (pair * width + column) * 4)


@inlined
def _multiply(
    panel_at, num_pairs, x_at, row_stride, pair_stride, num_rows, zeros_at, out_at, out_stride, num_columns,
    num_tokens, start, first_key,
):  # fmt: skip
    """Multiply rows with a panel.

    Queries of `num_tokens` tokens each see the first `start` keys and those up to their own: those that see
    none of the panel's keys, which begin with `first_key`, are passed over; where it is negative keys are
    summed, no more of them than are seen.
    """
    row = 0
    while row < num_rows:
        if row + _ROWS > num_rows >= _ROWS:
            # Some rows are made again, the same.
            row = num_rows - _ROWS
        count = _ROWS if row + _ROWS <= num_rows else 1
        pairs = num_pairs
        if num_tokens > 0:
            # Of rows of two heads the first ones are a head's last tokens.
            seen = start + min(row % num_tokens + count, num_tokens)
            if first_key < 0:
                pairs = min(num_pairs, (seen + 1) // 2)
            elif seen <= first_key:
                pairs = 0
        own_at, target_at = x_at + row * row_stride, out_at + row * out_stride
        if pairs > 0 and count == _ROWS:
            finish_6_rows_of_64(
                panel_at, pairs, own_at, row_stride, pair_stride, panel_at, 0, own_at, 0, 0,
                zeros_at, 0, target_at, out_stride, zeros_at, 0, num_columns,
            )  # fmt: skip
        elif pairs > 0:
            finish_1_row_of_64(
                panel_at, pairs, own_at, row_stride, pair_stride, panel_at, 0, own_at, 0, 0,
                zeros_at, 0, target_at, out_stride, zeros_at, 0, num_columns,
            )  # fmt: skip
        row += count


@inlined
def _over_keys(x_at, keys_at, sizes, zeros_at, panel_at, out_at):
    """Write queries' (or their gradients') products with keys (or values) that they see, [Q, W]."""
    num_queries, num_keys, size, num_tokens, start, width = sizes
    for first in range(0, num_keys, COLUMNS):
        num_columns = min(COLUMNS, num_keys - first)
        _pack_columns(keys_at + first * size * 2, num_columns, size, panel_at)
        _multiply(
            panel_at, size // 2, x_at, size * 2, 4, num_queries, zeros_at,
            out_at + first * 2, width * 2, num_columns, num_tokens, start, first,
        )  # fmt: skip


@inlined
def _sum_keys(weights_at, rows_at, sizes, zeros_at, panel_at, out_at):
    """Write the sums over seen keys of weights [Q, W] times rows [S, C], [Q, C]."""
    num_queries, num_keys, size, num_tokens, start, width = sizes
    for first in range(0, size, COLUMNS):
        num_columns = min(COLUMNS, size - first)
        _pack_pairs_of_rows(rows_at + first * 2, num_keys, size, num_columns, panel_at)
        _multiply(
            panel_at, (num_keys + 1) // 2, weights_at, width * 2, 4, num_queries, zeros_at,
            out_at + first * 2, size * 2, num_columns, num_tokens, start, -1,
        )  # fmt: skip


@inlined
def _sum_queries(weights_at, rows_at, sizes, zeros_at, turned_at, panel_at, out_at):
    """Write the sums over queries of weights [Q, W] times rows [Q, C], [S, C]."""
    num_queries, num_keys, size, _, _, width = sizes
    _turn_rows(weights_at, num_queries, width, zeros_at, turned_at)
    for first in range(0, size, COLUMNS):
        num_columns = min(COLUMNS, size - first)
        _pack_pairs_of_rows(rows_at + first * 2, num_queries, size, num_columns, panel_at)
        _multiply(
            panel_at, (num_queries + 1) // 2, turned_at, 4, width * 4, num_keys, zeros_at,
            out_at + first * 2, size * 2, num_columns, 0, 0, -1,
        )  # fmt: skip


@Kernel
def attend_pairs(data):
    """Write the weights [P, Q, W] of queries [P, Q, C] over keys, and what they attend to [P, Q, C]."""
    table = open_table(data)
    num_pairs = table[2]
    sizes = (table[3], table[4], table[5], table[6], table[7], table[8])
    num_queries, num_keys, size, num_tokens, start, width = sizes
    scratch_at = open_scratch(table, _SCRATCH, LINE_BYTES)
    panel_at = scratch_at + HEAD_BYTES
    begin, end = share(table, num_pairs)
    for pair in range(begin, end):
        by_query, by_key = pair * num_queries * size * 2, pair * num_keys * size * 2
        weights_at = table[12] + pair * num_queries * width * 2
        _over_keys(table[9] + by_query, table[10] + by_key, sizes, scratch_at, panel_at, weights_at)
        for row in range(num_queries):
            softmax_row(weights_at + row * width * 2, start + row % num_tokens + 1, width, data)
        _sum_keys(weights_at, table[11] + by_key, sizes, scratch_at, panel_at, table[13] + by_query)


@Kernel
def attend_pairs_backward(data):
    """Write the gradients of queries, keys and values from that of what the queries attended to."""
    table = open_table(data)
    num_pairs = table[2]
    sizes = (table[3], table[4], table[5], table[6], table[7], table[8])
    num_queries, num_keys, size, num_tokens, start, width = sizes
    scratch_at = open_scratch(table, _SCRATCH_BACKWARD, LINE_BYTES)
    panel_at = scratch_at + HEAD_BYTES
    scores_at = panel_at + table[19]
    turned_at = scores_at + num_queries * width * 2
    begin, end = share(table, num_pairs)
    for pair in range(begin, end):
        by_query, by_key = pair * num_queries * size * 2, pair * num_keys * size * 2
        query_at, gradient_at = table[9] + by_query, table[13] + by_query
        weights_at = table[12] + pair * num_queries * width * 2
        _over_keys(gradient_at, table[11] + by_key, sizes, scratch_at, panel_at, scores_at)
        for row in range(num_queries):
            own = row * width * 2
            seen = start + row % num_tokens + 1
            softmax_row_backward(scores_at + own, weights_at + own, seen, width, data)
        _sum_keys(scores_at, table[10] + by_key, sizes, scratch_at, panel_at, table[14] + by_query)
        _sum_queries(scores_at, query_at, sizes, scratch_at, turned_at, panel_at, table[15] + by_key)
        _sum_queries(weights_at, gradient_at, sizes, scratch_at, turned_at, panel_at, table[16] + by_key)
