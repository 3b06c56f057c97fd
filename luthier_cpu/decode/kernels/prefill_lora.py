"""The compiled low-rank updates of chunks of tokens, each with an adapter of its own, in pairs.

An adapter is stored as the kernels of single rows read it (batch_layout.py). Its ranks are packed as they
are used, which costs less than one block of 16 tokens; its outputs are read as they are stored. Pairs of a
chunk and a site are shared out among the threads.
"""

# numba reads the loops themselves and takes their types from the arguments.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from numba import carray

from luthier_cpu.codegen.instructions import LINE_BYTES
from luthier_cpu.codegen.numba_kernel import (
    Kernel,
    at_int64,
    inlined,
    open_table,
    share,
    thread_number,
)
from luthier_cpu.decode.batch_layout import PREFILL_BLOCK, PREFILL_RANK
from luthier_cpu.decode.kernels.low_rank_updates import add_pairs_to_rows
from luthier_cpu.gemm.bf16_gemm import multiply_tile, round_lanes
from luthier_cpu.gemm.bf16_gemv import sums_of_panel
from luthier_cpu.gemm.panel_blocks import pack_pairs
from luthier_cpu.gemm.tile_shapes import TILE_INPUTS, TILE_ROWS

_MIDDLE_BYTES = PREFILL_BLOCK * PREFILL_RANK * 2


def floats_of_low_rank(num_inputs: int) -> int:
    """Return the memory that a thread needs, in float32 numbers: middle, and ranks in tiles."""
    return _MIDDLE_BYTES // 4 + num_inputs * TILE_ROWS // 2


@inlined
def _pack_ranks(a_at, num_ranks, size, tiles_at):
    """Lay up to 16 rows [ranks, K] into tiles, a tile for 32 inputs; further rows repeat the last."""
    for first in range(0, size, TILE_INPUTS):
        pack_pairs(a_at + first * 2, size * 2, num_ranks, tiles_at + first * TILE_ROWS * 2, LINE_BYTES)


@inlined
def _fill_middle(a_at, num_ranks, size, x_at, num_tokens, tiles_at, sums_at, middle_at, width):
    """Write the products of up to `PREFILL_BLOCK` tokens with all ranks; 16 ranks at a time."""
    for first_rank in range(0, width, TILE_ROWS):
        _pack_ranks(a_at + first_rank * size * 2, min(TILE_ROWS, num_ranks - first_rank), size, tiles_at)
        for row in range(0, num_tokens, TILE_ROWS):
            num_rows = min(TILE_ROWS, num_tokens - row)
            rows_at = x_at + row * size * 2
            multiply_tile(tiles_at, rows_at, size * 2, size // TILE_INPUTS, num_rows, sums_at)
            for i in range(num_rows):
                # What repeats a rank is not read.
                round_lanes(sums_at + i * LINE_BYTES, middle_at + ((row + i) * width + first_rank) * 2)


@Kernel
def prefill_lora(data):
    """Add `B (A x)` to the columns of each site of each chunk [address, first token, tokens]; bfloat16."""
    table = open_table(data)
    num_chunks, size, width, num_sites, first_entry = table[2], table[3], table[4], table[5], table[6]
    x_at, out_at = table[7], table[8]
    chunks = carray(at_int64(table[9]), (num_chunks, 3))
    widths = carray(at_int64(table[10]), num_sites)
    middle_at = table[11] + thread_number(table) * table[12] * 4
    tiles_at = middle_at + _MIDDLE_BYTES
    sums_at = sums_of_panel()
    begin, end = share(table, num_chunks * num_sites)
    for item in range(begin, end):
        number, site = item // num_sites, item % num_sites
        entries = carray(at_int64(chunks[number, 0] + (first_entry + 4 * site) * 8), 4)
        num_ranks, num_outputs, column = entries[2], widths[site], 0
        if num_ranks == 0:
            continue
        for before in range(site):
            column += widths[before]
        middle_width = (num_ranks + TILE_ROWS - 1) // TILE_ROWS * TILE_ROWS
        for first in range(0, chunks[number, 2], PREFILL_BLOCK):
            num_tokens = min(PREFILL_BLOCK, chunks[number, 2] - first)
            token = chunks[number, 1] + first
            rows_at = x_at + token * size * 2
            _fill_middle(
                entries[0], num_ranks, size, rows_at, num_tokens, tiles_at, sums_at,
                middle_at, middle_width,
            )  # fmt: skip
            add_pairs_to_rows(
                entries[1], num_ranks, middle_at, middle_width * 2, num_tokens,
                out_at + (token * width + column) * 2, width * 2, num_outputs, entries[3], 0, data,
            )  # fmt: skip
