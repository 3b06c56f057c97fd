"""What a decode step does between its products in torch's operators: any device, and no compiler.

Legend: N tokens, M rows of one token, D hidden size, K inputs and O outputs of a site, E columns of q, k
and v.
"""

from collections.abc import Sequence

import torch

from luthier_cpu.decode.batch_layout import (
    PAGE_SIZE,
    AdapterDescriptor,
    ChunkRows,
    HeadShape,
    Pages,
    SingleRows,
    TokenRows,
    turn,
)
from luthier_cpu.decode.ops import attend_at_once
from tests.luthier_cpu import reference_kernels


class PlainOps:
    """The judge of `CompiledOps`, with the same methods.

    Args:
        site_widths: outputs of each of the seven sites.
    """

    max_alone = 1

    def __init__(self, shape: HeadShape, site_widths: Sequence[int]) -> None:
        self._shape, self._widths = shape, list(site_widths)

    def add_norm(
        self,
        stream_ND: torch.Tensor,
        change_ND: torch.Tensor | None,
        weight_D: torch.Tensor,
        out_ND: torch.Tensor,
    ) -> None:
        """Add the change to the stream, and write the normed and weighted sum."""
        if change_ND is not None:
            stream_ND += change_ND
        out_ND.copy_(reference_kernels.rms_norm(stream_ND, weight_D, self._shape.epsilon, out_ND.shape[1])[0])

    def attend(
        self, qkv_NE: torch.Tensor, tokens: TokenRows, pages: Pages, layer: int, out_NK: torch.Tensor
    ) -> None:
        """Put all tokens' keys and values into their pages; let those attend that do so by themselves."""
        positions_N, pages_NW = tokens.positions_N, tokens.pages_NW
        parts = qkv_NE.split(self._shape.widths, dim=-1)
        query, key, value = (part.unflatten(-1, (-1, self._shape.size)) for part in parts)
        query, key = (turn(one, positions_N, self._shape) for one in (query, key))
        own_N = pages_NW.gather(1, (positions_N // PAGE_SIZE)[:, None])[:, 0]
        for whole, one in ((pages.keys, key), (pages.values, value)):
            whole[layer][own_N, :, positions_N % PAGE_SIZE] = one
        groups = self._shape.num_heads // self._shape.num_kv_heads
        for row, position in enumerate(positions_N[: tokens.num_attending].tolist()):
            own_W = pages_NW[row, : position // PAGE_SIZE + 1]
            keys, values = pages.gather(layer, own_W, position + 1)
            by_head = query[row].view(self._shape.num_kv_heads, groups, self._shape.size)
            scores = torch.bmm(by_head.float(), keys.float().transpose(1, 2)) * self._shape.size**-0.5
            mixed = torch.bmm(torch.softmax(scores, dim=-1), values.float())
            out_NK[row] = mixed.reshape(-1).to(out_NK.dtype)

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
        attend_at_once(qkv_NE, tokens, chunks, pages, layer, self._shape, out_NK)

    def gate(self, gate_up_NF: torch.Tensor, out_NF: torch.Tensor) -> None:
        """Write silu(gate) * up."""
        out_NF.copy_(reference_kernels.gated_silu(gate_up_NF, out_NF.shape[1]))

    def add_low_rank(
        self,
        out_NO: torch.Tensor,
        x_NK: torch.Tensor,
        rows: SingleRows,
        layer: int,
        sites: slice,
    ) -> None:
        """Add the rows' low-rank updates to the first M results of layers that share an input."""
        for adapter, own in _by_adapter(rows):
            part = out_NO[own]
            adapter.add_low_ranks_to(part, x_NK[own], layer, sites, self._widths)
            out_NO[own] = part

    def add_low_rank_to_chunks(
        self, out_NO: torch.Tensor, x_NK: torch.Tensor, chunks: ChunkRows, layer: int, sites: slice
    ) -> None:
        """Add the low-rank updates of chunks to their tokens' results of layers that share an input."""
        chunks.add_low_ranks(out_NO, x_NK, layer, sites, self._widths)

    def add_bottleneck(
        self, out_ND: torch.Tensor, input_ND: torch.Tensor, rows: SingleRows, layer: int, half: int
    ) -> None:
        """Add the rows' bottlenecks to the first M results of a half (0 attention, 1 feed-forward)."""
        for adapter, own in _by_adapter(rows):
            site = adapter.bottlenecks[layer][half]
            if site is not None:
                part = out_ND[own]
                site.add_to(part, input_ND[own])
                out_ND[own] = part


def _by_adapter(rows: SingleRows) -> list[tuple[AdapterDescriptor, list[int]]]:
    found: dict[int, tuple[AdapterDescriptor, list[int]]] = {}
    for row, adapter in enumerate(rows.adapters):
        if adapter is not None:
            found.setdefault(id(adapter), (adapter, []))[1].append(row)
    return list(found.values())
