"""The kernels of a decode step between its products, for batches of any adapters.

Legend: N tokens, M rows of one token, D hidden size, K inputs and O outputs of a site, E columns of q, k
and v.
"""

from collections.abc import Sequence

import torch

from luthier_cpu.codegen import kernels
from luthier_cpu.codegen.openmp import Launcher
from luthier_cpu.decode.batch_layout import (
    BOTTLENECK_ENTRIES,
    LAYER_ENTRIES,
    MAX_QUERIES,
    NUM_SITES,
    PAGE_SIZE,
    PREFILL_RANK,
    SITE_ENTRIES,
    ChunkRows,
    HeadShape,
    Pages,
    SingleRows,
    TokenRows,
    turn,
)
from luthier_cpu.gemm.products import has_tiles
from luthier_cpu.gemm.tile_shapes import TILE_INPUTS


class CompiledOps:
    """The compiled kernels; all tensors are changed in place or written.

    `max_alone` is the longest a sequence may be for its tokens to attend faster one by one than all at once.

    Args:
        site_widths: outputs of each of the seven sites.
        max_middle: the largest rank or bottleneck width that a row may have.
    """

    def __init__(
        self, shape: HeadShape, site_widths: Sequence[int], like: torch.Tensor, max_middle: int
    ) -> None:
        from luthier_cpu.decode.kernels.prefill_attention import floats_of_attention
        from luthier_cpu.decode.kernels.prefill_lora import floats_of_low_rank

        self._shape = shape
        self._widths = torch.tensor(site_widths, dtype=torch.int64)
        self._longest = len(shape.cosine_TC) + PAGE_SIZE
        widest = max(*site_widths, shape.num_heads * shape.size)
        needed = max(
            MAX_QUERIES * (self._longest + 2 * shape.size),
            widest + max_middle + max(*site_widths, max_middle // 2),
            floats_of_low_rank(widest),
            floats_of_attention(shape.size),
        )
        # Each thread's part begins a cache line, which kernels write whole, and another's is as far.
        self._scratch_width = -(-needed // 16) * 16 + 16
        self._scratch = torch.empty(0, dtype=torch.float32)
        in_tiles_too = like.dtype == torch.bfloat16 and has_tiles()

        def launcher(name: str) -> Launcher:
            return Launcher(kernels.compiled_address(name, like.dtype))

        self._prefill_lora = launcher("prefill_lora") if in_tiles_too else None
        has_attention = in_tiles_too and shape.size % TILE_INPUTS == 0
        self._prefill_attention = launcher("prefill_attention") if has_attention else None
        self.max_alone = 512 if self._prefill_attention is None else 1
        launchers = map(launcher, kernels.SERVING)
        self._norm, self._attend, self._low_rank, self._bottleneck, self._gate = launchers
        # Not compiled at the first step, whose thread serves every sequence.
        for name in kernels.CHOOSING:
            kernels.compiled_address(name, like.dtype)
        self._epsilon = kernels.float_bits(shape.epsilon)
        self._scale = kernels.float_bits(shape.size**-0.5)

    def add_norm(
        self,
        stream_ND: torch.Tensor,
        change_ND: torch.Tensor | None,
        weight_D: torch.Tensor,
        out_ND: torch.Tensor,
    ) -> None:
        """Add the change to the stream, and write the normed and weighted sum."""
        num_rows, size = stream_ND.shape
        change = 0 if change_ND is None else change_ND.data_ptr()
        self._norm.run(
            (
                num_rows,
                size,
                self._epsilon,
                int(change_ND is not None),
                stream_ND.data_ptr(),
                change or stream_ND.data_ptr(),
                weight_D.data_ptr(),
                out_ND.data_ptr(),
            ),
            by_rows=True,
        )

    def attend(
        self, qkv_NE: torch.Tensor, tokens: TokenRows, pages: Pages, layer: int, out_NK: torch.Tensor
    ) -> None:
        """Put all tokens' keys and values into their pages; let those attend that do so by themselves."""
        if tokens.are_alone:
            self._run_attend(len(tokens), (1, 1), qkv_NE, tokens, pages, layer, out_NK)
            return
        self._run_attend(len(tokens), (1, 0), qkv_NE, tokens, pages, layer, out_NK)
        self._run_attend(tokens.num_attending, (0, 1), qkv_NE, tokens, pages, layer, out_NK)

    def _run_attend(
        self,
        num_rows: int,
        parts: tuple[int, int],
        qkv_NE: torch.Tensor,
        tokens: TokenRows,
        pages: Pages,
        layer: int,
        out_NK: torch.Tensor,
    ) -> None:
        shape = self._shape
        # Pairs of a row and a key head are shared out; whole rows, where each thread has as many of these.
        by_rows = tokens.are_alone and num_rows % torch.get_num_threads() == 0
        self._attend.run(
            (
                num_rows,
                shape.num_kv_heads,
                shape.num_heads // shape.num_kv_heads,
                shape.size,
                self._scale,
                PAGE_SIZE,
                tokens.pages_NW.shape[1],
                qkv_NE.data_ptr(),
                tokens.positions_N.data_ptr(),
                shape.cosine_TC.data_ptr(),
                shape.sine_TC.data_ptr(),
                tokens.pages_NW.data_ptr(),
                pages.keys[layer].data_ptr(),
                pages.values[layer].data_ptr(),
                out_NK.data_ptr(),
                *self._scratch_of_threads(),
                *parts,
                self._longest,
                int(by_rows),
            ),
            by_rows=by_rows,
        )

    def attend_chunks(
        self,
        qkv_NE: torch.Tensor,
        tokens: TokenRows,
        chunks: ChunkRows,
        pages: Pages,
        layer: int,
        out_NK: torch.Tensor,
    ) -> None:
        """Let chunks that attend at once do so, their keys and values in their pages."""
        if self._prefill_attention is None:
            attend_at_once(qkv_NE, tokens, chunks, pages, layer, self._shape, out_NK)
            return
        shape, num_chunks = self._shape, len(chunks.places_S3)
        num_items, num_threads, num_parts = num_chunks * shape.num_kv_heads, torch.get_num_threads(), 1
        # The fewest parts with which all threads have about the same to do: each lays the values anew.
        while num_items * num_parts % num_threads and num_items * num_parts < 4 * num_threads:
            num_parts += 1
        self._prefill_attention.run(
            (
                num_chunks,
                shape.num_kv_heads,
                shape.num_heads // shape.num_kv_heads,
                shape.size,
                self._scale,
                tokens.pages_NW.shape[1],
                num_parts,
                len(tokens),
                qkv_NE.data_ptr(),
                chunks.places_S3.data_ptr(),
                tokens.pages_NW.data_ptr(),
                shape.cosine_TC.data_ptr(),
                shape.sine_TC.data_ptr(),
                pages.keys[layer].data_ptr(),
                pages.values[layer].data_ptr(),
                out_NK.data_ptr(),
                *self._scratch_of_threads(),
            )
        )

    def gate(self, gate_up_NF: torch.Tensor, out_NF: torch.Tensor) -> None:
        """Write silu(gate) * up."""
        num_rows, size = out_NF.shape
        self._gate.run((num_rows, size, size, gate_up_NF.data_ptr(), out_NF.data_ptr()), by_rows=True)

    def add_low_rank(
        self,
        out_NO: torch.Tensor,
        x_NK: torch.Tensor,
        rows: SingleRows,
        layer: int,
        sites: slice,
    ) -> None:
        """Add the rows' low-rank updates to the first M results of layers that share an input."""
        self._low_rank.run(
            (
                len(rows),
                x_NK.shape[1],
                out_NO.shape[1],
                sites.stop - sites.start,
                layer * LAYER_ENTRIES + sites.start * SITE_ENTRIES,
                x_NK.data_ptr(),
                out_NO.data_ptr(),
                rows.table_M.data_ptr(),
                self._widths.data_ptr() + 8 * sites.start,
                *self._scratch_of_threads(),
            ),
            by_rows=True,
        )

    def add_low_rank_to_chunks(
        self, out_NO: torch.Tensor, x_NK: torch.Tensor, chunks: ChunkRows, layer: int, sites: slice
    ) -> None:
        """Add the low-rank updates of chunks to their tokens' results of layers that share an input."""
        if self._prefill_lora is None or x_NK.shape[1] % TILE_INPUTS != 0:
            chunks.add_low_ranks(out_NO, x_NK, layer, sites, self._widths.tolist())
            return
        if len(chunks.table_S3):
            self._prefill_lora.run(
                (
                    len(chunks.table_S3),
                    x_NK.shape[1],
                    out_NO.shape[1],
                    sites.stop - sites.start,
                    layer * LAYER_ENTRIES + sites.start * SITE_ENTRIES,
                    x_NK.data_ptr(),
                    out_NO.data_ptr(),
                    chunks.table_S3.data_ptr(),
                    self._widths.data_ptr() + 8 * sites.start,
                    *self._scratch_of_threads(),
                )
            )
        # Wider ones than the kernel takes.
        chunks.add_low_ranks(out_NO, x_NK, layer, sites, self._widths.tolist(), min_rank=PREFILL_RANK + 1)

    def add_bottleneck(
        self, out_ND: torch.Tensor, input_ND: torch.Tensor, rows: SingleRows, layer: int, half: int
    ) -> None:
        """Add the rows' bottlenecks to the first M results of a half (0 attention, 1 feed-forward)."""
        entry = layer * LAYER_ENTRIES + NUM_SITES * SITE_ENTRIES + half * BOTTLENECK_ENTRIES
        self._bottleneck.run(
            (
                len(rows),
                out_ND.shape[1],
                entry,
                input_ND.data_ptr(),
                out_ND.data_ptr(),
                rows.table_M.data_ptr(),
                *self._scratch_of_threads(),
            ),
            by_rows=True,
        )

    @property
    def has_prefill_kernels(self) -> bool:
        """Whether kernels do all that is asked for chunks, of ranks up to `PREFILL_RANK`."""
        return self._prefill_lora is not None and self._prefill_attention is not None

    @property
    def memory_at(self) -> int:
        """The address of the kernels' own memory; it moves when threads are added."""
        return self._scratch_of_threads()[0]

    def _scratch_of_threads(self) -> tuple[int, int]:
        needed = torch.get_num_threads() * self._scratch_width
        if self._scratch.numel() < needed:
            self._scratch = torch.empty(needed, dtype=torch.float32)
        return self._scratch.data_ptr(), self._scratch_width


def attend_at_once(
    qkv_NE: torch.Tensor,
    tokens: TokenRows,
    chunks: ChunkRows,
    pages: Pages,
    layer: int,
    shape: HeadShape,
    out_NK: torch.Tensor,
) -> None:
    """Let chunks whose tokens do not attend one by one attend to all of their sequences so far."""
    for own, first in zip(chunks.tokens, chunks.positions, strict=True):
        if own.start < tokens.num_attending:
            continue
        num_tokens = own.stop - own.start
        end = first + num_tokens
        query_TK = qkv_NE[own, : shape.widths[0]]
        query = turn(query_TK.unflatten(-1, (-1, shape.size)), tokens.positions_N[own], shape)
        pages_W = tokens.pages_NW[own.start, : -(-end // PAGE_SIZE)]
        keys, values = pages.gather(layer, pages_W, end)
        # The query heads of a key head are its rows.
        by_head = (query * shape.size**-0.5).view(num_tokens, shape.num_kv_heads, -1, shape.size)
        by_head = by_head.permute(1, 2, 0, 3).reshape(shape.num_kv_heads, -1, shape.size)
        weights = kernels.causal_softmax_(torch.bmm(by_head, keys.transpose(1, 2)), num_tokens, first)
        mixed = torch.bmm(weights, values).view(shape.num_kv_heads, -1, num_tokens, shape.size)
        out_NK[own] = mixed.permute(2, 0, 1, 3).reshape(num_tokens, -1)
