"""A Llama-shaped base laid out for serving: packed products, paged keys and values, adapters row by row.

A step runs tokens of many sequences at once: rows of one token, each with an adapter of its own, through the
kernels of kernels/serving.py, and stretches of prompts through products over the whole stretch. All share
the products with the base's weights, so that these are read once a step.

Legend: N tokens of a step (M single ones first, then T of each stretch), D hidden size, E columns of q, k
and v, K attended columns, F feed-forward size, H key heads, C head size, V vocabulary, R asked-for rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from luthier.modeling import kernels
from luthier.modeling.fused_llama import is_known_base
from luthier.modeling.kernels.served_rows import (
    ATTENTION_IN,
    ATTENTION_OUT,
    FEED_FORWARD_IN,
    FEED_FORWARD_OUT,
    PAGE_SIZE,
    Described,
    HeadShape,
    Pages,
    SingleRows,
    TokenRows,
    token_rows,
    turn,
)
from luthier.modeling.kernels.serving import CompiledOps, Ops, PlainOps
from luthier.modeling.packed_linear import PackedLinear

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedModel

# The widest rank or bottleneck of an adapter that is served here; wider ones go by the plain path.
MAX_MIDDLE = 1024


@dataclass(frozen=True, eq=False)
class Stretch:
    """Tokens of one sequence that are run now.

    `tokens` are ids, or vectors [T, D] in their place; `first` is the position of the first, and all before
    it are in `pages`, which reach to the last. `adapter` is what these rows bear. Logits are wanted after its
    last token, after all of them, or not at all.
    """

    tokens: Sequence[int] | torch.Tensor
    first: int
    pages: Sequence[int]
    adapter: Described | None = None
    wants_logits: bool = True
    wants_all_logits: bool = False

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def num_logits(self) -> int:
        """Rows of logits that it gets."""
        return len(self.tokens) if self.wants_all_logits else int(self.wants_logits)


@dataclass(frozen=True, eq=False)
class _Block:
    attention_norm_D: torch.Tensor
    attention_in: PackedLinear
    attention_out: PackedLinear
    feed_forward_norm_D: torch.Tensor
    feed_forward_in: PackedLinear
    feed_forward_out: PackedLinear


@dataclass(frozen=True, eq=False)
class _Chunk:
    """A stretch of several tokens and its place among a step's tokens."""

    stretch: Stretch
    tokens: slice
    positions_T: torch.Tensor
    pages_W: torch.Tensor


def can_pack_llama(causal_lm: "PreTrainedModel") -> bool:
    """Whether a bare base is one that `PackedLlama` runs: a Llama whose every part is known.

    Rotary scalings that change with the length, which would need more than one table, are not.
    """
    return is_known_base(causal_lm, "default")


class PackedLlama:
    """The base. Only one thread may call `step` at a time.

    Args:
        causal_lm: the base, of the kind that `can_pack_llama` tells; its weights are copied.
        num_pages: pages of keys and values, of `PAGE_SIZE` tokens each.
    """

    def __init__(self, causal_lm: "LlamaForCausalLM", *, num_pages: int) -> None:
        config, body = causal_lm.config, causal_lm.model
        self.embedding_VD: torch.Tensor = body.embed_tokens.weight.detach()
        self.num_layers = config.num_hidden_layers
        self._blocks = [_pack_block(layer) for layer in body.layers]
        self._norm_D = body.norm.weight.detach()
        self._head = PackedLinear(causal_lm.get_output_embeddings().weight.detach())
        size = body.layers[0].self_attn.head_dim
        positions_1T = torch.arange(config.max_position_embeddings, device=self.embedding_VD.device)[None]
        # In float32, so that the tables are not rounded to the weights' type.
        turning = body.rotary_emb(self._norm_D.float()[None, None], position_ids=positions_1T)
        cosine_TC, sine_TC = (part[0, :, : size // 2].float().contiguous() for part in turning)
        self.heads = HeadShape(
            config.num_attention_heads,
            config.num_key_value_heads,
            size,
            cosine_TC,
            sine_TC,
            float(body.norm.variance_epsilon),
        )
        wide, half = config.intermediate_size, config.hidden_size
        self.site_widths = (*self.heads.widths, half, wide, wide, half)
        self.ops: Ops = self._make_ops()
        self.pages = Pages(
            num_layers=self.num_layers,
            num_pages=num_pages,
            num_kv_heads=self.heads.num_kv_heads,
            head_size=size,
            like=self._norm_D,
        )

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights, of keys and values, and of adapters."""
        return self._norm_D.dtype

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self._norm_D.device

    @property
    def context_length(self) -> int:
        """Positions that a sequence may have."""
        return len(self.heads.cosine_TC)

    def _make_ops(self) -> Ops:
        if kernels.is_compiled(self._norm_D):
            return CompiledOps(self.heads, self.site_widths, self._norm_D, MAX_MIDDLE)
        return PlainOps(self.heads, self.site_widths)

    @torch.inference_mode()
    def step(self, stretches: Sequence[Stretch]) -> torch.Tensor:
        """Run tokens, and put their keys and values into their sequences' pages.

        Args:
            stretches: at most one a sequence.

        Returns:
            logits_RV, float32, those that each stretch wants, in order.

        Raises:
            ValueError: when a stretch reaches beyond its pages or the context.
        """
        for one in stretches:
            end = one.first + len(one)
            # The kernels read and write where these point.
            if end > self.context_length or end > len(one.pages) * PAGE_SIZE:
                raise ValueError("A stretch is longer than its pages, or than the context.")
        singles = [one for one in stretches if len(one) == 1]
        # Those whose tokens attend by themselves come first.
        chunks = sorted((one for one in stretches if len(one) > 1), key=self._attends_at_once)
        rows = SingleRows([one.adapter for one in singles])
        places = self._place_chunks(chunks, len(singles))
        tokens = self._place_tokens(singles, chunks)
        stream_ND = torch.cat([self._embed(one) for one in (*singles, *chunks)])
        normed_ND = torch.empty_like(stream_ND)
        attended_NK = stream_ND.new_empty(len(stream_ND), self.heads.widths[0])
        change_ND: torch.Tensor | None = None
        for layer, block in enumerate(self._blocks):
            self.ops.add_norm(stream_ND, change_ND, block.attention_norm_D, normed_ND)
            change_ND = self._attend(layer, block, normed_ND, attended_NK, rows, tokens, places)
            self.ops.add_norm(stream_ND, change_ND, block.feed_forward_norm_D, normed_ND)
            change_ND = self._feed_forward(layer, block, normed_ND, rows, places)
        return self._logits(stream_ND, change_ND, stretches, singles, places)

    def _attend(
        self,
        layer: int,
        block: _Block,
        normed_ND: torch.Tensor,
        attended_NK: torch.Tensor,
        rows: SingleRows,
        tokens: TokenRows,
        places: list[_Chunk],
    ) -> torch.Tensor:
        qkv_NE = block.attention_in(normed_ND)
        self._add_low_ranks(qkv_NE, normed_ND, rows, places, layer, ATTENTION_IN)
        self.ops.attend(qkv_NE, tokens, self.pages, layer, attended_NK)
        for chunk in places:
            if chunk.tokens.start >= tokens.num_attending:
                self._attend_chunk(qkv_NE[chunk.tokens], chunk, layer, attended_NK[chunk.tokens])
        out_ND = block.attention_out(attended_NK)
        self._add_low_ranks(out_ND, attended_NK, rows, places, layer, ATTENTION_OUT)
        self._add_bottlenecks(out_ND, normed_ND, rows, places, layer, 0)
        return out_ND

    def _feed_forward(
        self, layer: int, block: _Block, normed_ND: torch.Tensor, rows: SingleRows, places: list[_Chunk]
    ) -> torch.Tensor:
        gate_up_NF = block.feed_forward_in(normed_ND)
        self._add_low_ranks(gate_up_NF, normed_ND, rows, places, layer, FEED_FORWARD_IN)
        hidden_NF = self.ops.gate(gate_up_NF)
        out_ND = block.feed_forward_out(hidden_NF)
        self._add_low_ranks(out_ND, hidden_NF, rows, places, layer, FEED_FORWARD_OUT)
        self._add_bottlenecks(out_ND, normed_ND, rows, places, layer, 1)
        return out_ND

    def _add_low_ranks(
        self,
        out_NO: torch.Tensor,
        x_NK: torch.Tensor,
        rows: SingleRows,
        places: list[_Chunk],
        layer: int,
        sites: slice,
    ) -> None:
        if rows.has_low_ranks:
            self.ops.add_low_rank(out_NO, x_NK, rows, layer, sites)
        for chunk in places:
            adapter = chunk.stretch.adapter
            if adapter is not None and adapter.has_low_ranks:
                own = out_NO[chunk.tokens]
                adapter.add_low_ranks_to(own, x_NK[chunk.tokens], layer, sites, self.site_widths)

    def _add_bottlenecks(
        self,
        out_ND: torch.Tensor,
        input_ND: torch.Tensor,
        rows: SingleRows,
        places: list[_Chunk],
        layer: int,
        half: int,
    ) -> None:
        if rows.has_bottlenecks:
            self.ops.add_bottleneck(out_ND, input_ND, rows, layer, half)
        for chunk in places:
            adapter = chunk.stretch.adapter
            site = adapter.bottlenecks[layer][half] if adapter is not None else None
            if site is not None:
                site.add_to(out_ND[chunk.tokens], input_ND[chunk.tokens])

    def _attend_chunk(self, qkv_TE: torch.Tensor, chunk: _Chunk, layer: int, out_TK: torch.Tensor) -> None:
        """Let a stretch, its keys and values in their pages, attend to all of its sequence so far."""
        num_tokens, first = len(chunk.stretch), chunk.stretch.first
        query_TK = qkv_TE[:, : self.heads.widths[0]]
        query = turn(query_TK.unflatten(-1, (-1, self.heads.size)), chunk.positions_T, self.heads)
        keys, values = self.pages.gather(layer, chunk.pages_W, first + num_tokens)
        num_kv_heads, size = self.heads.num_kv_heads, self.heads.size
        # The query heads of a key head are its rows.
        by_head = (query * size**-0.5).view(num_tokens, num_kv_heads, -1, size).permute(1, 2, 0, 3)
        scores = torch.bmm(by_head.reshape(num_kv_heads, -1, size), keys.transpose(1, 2))
        weights = kernels.causal_softmax_(scores, num_tokens, first)
        mixed = torch.bmm(weights, values).view(num_kv_heads, -1, num_tokens, size)
        out_TK.copy_(mixed.permute(2, 0, 1, 3).reshape(num_tokens, -1))

    def _logits(
        self,
        stream_ND: torch.Tensor,
        change_ND: torch.Tensor | None,
        stretches: Sequence[Stretch],
        singles: list[Stretch],
        places: list[_Chunk],
    ) -> torch.Tensor:
        ends = {id(one): row + 1 for row, one in enumerate(singles)}
        ends |= {id(chunk.stretch): chunk.tokens.stop for chunk in places}
        wanted: list[int] = []
        for one in stretches:
            end = ends[id(one)]
            wanted.extend(range(end - one.num_logits, end))
        if not wanted:
            return stream_ND.new_empty(0, self._head.num_outputs, dtype=torch.float32)
        wanted_R = torch.tensor(wanted, device=self.device)
        own_RD = stream_ND[wanted_R]
        normed_RD = torch.empty_like(own_RD)
        change_RD = None if change_ND is None else change_ND[wanted_R]
        self.ops.add_norm(own_RD, change_RD, self._norm_D, normed_RD)
        return self._head(normed_RD).float()

    def _embed(self, stretch: Stretch) -> torch.Tensor:
        if isinstance(stretch.tokens, torch.Tensor):
            return stretch.tokens.to(device=self.device, dtype=self.dtype)
        return self.embedding_VD[torch.tensor(stretch.tokens, device=self.device)]

    def _attends_at_once(self, chunk: Stretch) -> bool:
        return chunk.first + len(chunk) > self.ops.max_alone

    def _place_tokens(self, singles: Sequence[Stretch], chunks: Sequence[Stretch]) -> TokenRows:
        alone = sum(len(one) for one in chunks if not self._attends_at_once(one))
        return token_rows(
            [(one.first, len(one), one.pages) for one in (*singles, *chunks)],
            device=self.device,
            num_attending=len(singles) + alone,
            are_alone=not chunks,
        )

    def _place_chunks(self, chunks: Sequence[Stretch], start: int) -> list[_Chunk]:
        places = []
        for one in chunks:
            tokens = slice(start, start + len(one))
            start = tokens.stop
            end = one.first + len(one)
            positions_T = torch.arange(one.first, end, device=self.device)
            pages_W = torch.tensor(one.pages[: -(-end // PAGE_SIZE)], device=self.device)
            places.append(_Chunk(one, tokens, positions_T, pages_W))
        return places


def _pack_block(layer: torch.nn.Module) -> _Block:
    attention, feed_forward = layer.self_attn, layer.mlp

    def packed(*linears: torch.nn.Module) -> PackedLinear:
        return PackedLinear(torch.cat([one.weight.detach() for one in linears]))

    return _Block(
        attention_norm_D=layer.input_layernorm.weight.detach(),
        attention_in=packed(attention.q_proj, attention.k_proj, attention.v_proj),
        attention_out=packed(attention.o_proj),
        feed_forward_norm_D=layer.post_attention_layernorm.weight.detach(),
        feed_forward_in=packed(feed_forward.gate_proj, feed_forward.up_proj),
        feed_forward_out=packed(feed_forward.down_proj),
    )
