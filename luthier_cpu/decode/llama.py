"""A Llama-shaped base packed for serving: packed products, paged keys and values, adapters row by row.

A step runs tokens of many sequences at once: rows of one token, each with an adapter of its own, through the
kernels of decode/ops.py, and chunks of prompts through products over the whole chunk. All share
the products with the base's weights, so that these are read once a step. On a CPU a step is a program of
kernels, of single rows alone one that was written down before (decode/decode_graph.py).

Legend: N tokens of a step (M single ones first, then T of each chunk), D hidden size, E columns of q, k
and v, K attended columns, F feed-forward size, H key heads, C head size, V vocabulary, R asked-for rows.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from luthier_cpu.codegen.page_memory import take_large
from luthier_cpu.decode.batch import Buffers, Chunk, StepInputs
from luthier_cpu.decode.batch_layout import (
    ATTENTION_IN,
    ATTENTION_OUT,
    FEED_FORWARD_IN,
    FEED_FORWARD_OUT,
    PAGE_SIZE,
    ChunkRows,
    HeadShape,
    Pages,
    SingleRows,
    token_rows,
)
from luthier_cpu.decode.decode_graph import DecodePrograms
from luthier_cpu.decode.linear import PackedLinear
from luthier_cpu.decode.ops import CompiledOps
from luthier_cpu.decode.sampling import Logits
from luthier_cpu.gemm.products import can_tile, tiled_bytes
from luthier_cpu.training.llama import is_known_base

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedModel

# The widest rank or bottleneck of an adapter that is served here; wider ones go by the plain path.
MAX_MIDDLE = 1024


def can_pack_llama(causal_lm: "PreTrainedModel") -> bool:
    """Whether a bare base is one that `PackedLlama` runs: a Llama whose every part is known.

    Rotary scalings that change with the length, which would need more than one table, are not.
    """
    return is_known_base(causal_lm, "default")


@dataclass(frozen=True, eq=False)
class _Block:
    """A block of a base: products over layers that share an input, and the norms before them."""

    attention_norm_D: torch.Tensor
    attention_in: PackedLinear
    attention_out: PackedLinear
    feed_forward_norm_D: torch.Tensor
    feed_forward_in: PackedLinear
    feed_forward_out: PackedLinear

    @property
    def products(self) -> tuple[PackedLinear, ...]:
        """All its products with weights."""
        return self.attention_in, self.attention_out, self.feed_forward_in, self.feed_forward_out


class WeightMemory:
    """Memory for the weights in tiles, in the order in which a step reads them.

    Args:
        weights: all that will be packed.
    """

    def __init__(self, weights: Sequence[torch.Tensor]) -> None:
        num_bytes = sum(tiled_bytes(one) for one in weights if can_tile(one))
        self._room = take_large(num_bytes) if num_bytes else None

    def pack(self, *weights: torch.Tensor) -> PackedLinear:
        """Return layers that share an input as one."""
        weight_OK = weights[0] if len(weights) == 1 else torch.cat(weights)
        if self._room is None or not can_tile(weight_OK):
            return PackedLinear(weight_OK)
        own, self._room = self._room.tensor_split([tiled_bytes(weight_OK)])
        return PackedLinear(weight_OK, own)


def _linears_of(layer: torch.nn.Module) -> list[torch.Tensor]:
    """Return the seven weights of a Llama's block, in the order in which a step reads them."""
    attention, feed_forward = layer.self_attn, layer.mlp
    inward, outward = (attention.q_proj, attention.k_proj, attention.v_proj), (attention.o_proj,)
    linears = (*inward, *outward, feed_forward.gate_proj, feed_forward.up_proj, feed_forward.down_proj)
    return [one.weight.detach() for one in linears]


def _pack_block(layer: torch.nn.Module, memory: WeightMemory) -> _Block:
    """Return a Llama's block with its weights copied into memory; the layer's own are given back."""
    query, key, value, out, gate, up, down = _linears_of(layer)
    block = _Block(
        attention_norm_D=layer.input_layernorm.weight.detach(),
        attention_in=memory.pack(query, key, value),
        attention_out=memory.pack(out),
        feed_forward_norm_D=layer.post_attention_layernorm.weight.detach(),
        feed_forward_in=memory.pack(gate, up),
        feed_forward_out=memory.pack(down),
    )
    for parameter in layer.parameters():
        parameter.data = parameter.data.new_empty(0)
    return block


class PackedLlama:
    """The base. Only one thread may call `step` at a time.

    Args:
        causal_lm: the base, which `can_pack_llama` accepts. It loses the weights of its layers one
            by one as they are packed, so that they are never in memory twice; it can't be used afterwards.
        num_pages: pages of keys and values, of `PAGE_SIZE` tokens each.
    """

    def __init__(self, causal_lm: "LlamaForCausalLM", *, num_pages: int) -> None:
        config, body = causal_lm.config, causal_lm.model
        self.embedding_VD: torch.Tensor = body.embed_tokens.weight.detach()
        self.num_layers = config.num_hidden_layers
        self._norm_D = body.norm.weight.detach()
        head_VD = causal_lm.get_output_embeddings().weight.detach()
        memory = WeightMemory([*(one for layer in body.layers for one in _linears_of(layer)), head_VD])
        self._blocks = [_pack_block(layer, memory) for layer in body.layers]
        self._head = memory.pack(head_VD)
        size = body.layers[0].self_attn.head_dim
        positions_1T = torch.arange(config.max_position_embeddings)[None]
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
        # Positions that a sequence may have.
        self.context_length = len(cosine_TC)
        wide, half = config.intermediate_size, config.hidden_size
        self.site_widths = (*self.heads.widths, half, wide, wide, half)
        self.ops = CompiledOps(self.heads, self.site_widths, self._norm_D, MAX_MIDDLE)
        self.pages = Pages(
            num_layers=self.num_layers,
            num_pages=num_pages,
            num_kv_heads=self.heads.num_kv_heads,
            head_size=size,
            like=self._norm_D,
        )
        products = (self._head, *(one for block in self._blocks for one in block.products))
        self._is_tiled = all(one.tiled is not None for one in products)
        self._programs = DecodePrograms(self) if self._is_tiled else None

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights, of keys and values, and of adapters."""
        return self._norm_D.dtype

    @property
    def vocabulary_size(self) -> int:
        """Logits of a row."""
        return self._head.num_outputs

    def step(self, chunks: Sequence[Chunk], on_launch: Callable[[], None] | None = None) -> Logits:
        """Run tokens, and put their keys and values into their sequences' pages.

        Args:
            chunks: of each sequence one, or one of several tokens and a last token after it.
            on_launch: called when all is prepared, before the long work without the interpreter's lock.

        Returns:
            Those that each chunk wants, in order; they may be overwritten by the next step.

        Raises:
            ValueError: when a chunk reaches beyond its pages or the context, or runs by rows and does not
                want all logits.
        """
        for one in chunks:
            end = one.first + len(one.tokens)
            # The kernels read and write where these point.
            if end > self.context_length or end > len(one.pages) * PAGE_SIZE:
                raise ValueError("A chunk is longer than its pages, or than the context.")
            if one.by_rows and one.num_logits != len(one):
                raise ValueError("A chunk that runs by rows wants the logits after each of them.")
        if self._programs is not None and self._programs.can_run(chunks):
            return self._programs.step(self, chunks, on_launch)
        return self._step_chunks(chunks, on_launch)

    @torch.inference_mode()
    def _step_chunks(self, chunks: Sequence[Chunk], on_launch: Callable[[], None] | None) -> Logits:
        singles = [one for one in chunks if len(one) == 1]
        # Those whose tokens attend by themselves come first.
        longer = sorted((one for one in chunks if len(one) > 1), key=self._attends_at_once)
        ordered = [*singles, *longer]
        ends = list(itertools.accumulate(map(len, ordered)))
        slices = [slice(end - len(one), end) for one, end in zip(ordered, ends, strict=True)]
        alone = sum(len(one) for one in longer if not self._attends_at_once(one))
        inputs = StepInputs(
            SingleRows([one.adapter for one in singles]),
            token_rows(
                [(one.first, len(one), one.pages) for one in ordered],
                num_attending=len(singles) + alone,
                are_alone=not longer,
            ),
            ChunkRows([one.adapter for one in longer], slices[len(singles) :], [one.first for one in longer])
            if longer
            else None,
        )
        buffers = self.make_buffers(sum(map(len, ordered)))
        self.embed(ordered, buffers.stream_ND)
        if self._programs is not None and self._programs.can_write(self, inputs):
            self._programs.run_layers(self, buffers, inputs, on_launch)
        else:
            if on_launch is not None:
                on_launch()
            self.run_layers(buffers, inputs)
        begins = {id(one): own.start for one, own in zip(ordered, slices, strict=True)}
        return self._logits(buffers, inputs, chunks, begins)

    def make_buffers(self, num_tokens: int) -> Buffers:
        """Return the buffers of a step of a number of tokens."""
        size, feed_forward = self.embedding_VD.shape[1], self.site_widths[4]
        stays = (size, size, self.heads.widths[0], feed_forward)
        written = (size, sum(self.heads.widths), 2 * feed_forward)
        held = [self._norm_D.new_empty(num_tokens, width) for width in stays]
        products = [
            self._norm_D.new_empty(num_tokens, width) if self._is_tiled else None for width in written
        ]
        return Buffers(*held, *products)

    def embed(self, chunks: Sequence[Chunk], out_ND: torch.Tensor) -> None:
        """Write the vectors of chunks' tokens, one chunk after the other."""
        ids: list[int] = []
        for one in chunks:
            ids.extend([0] * len(one) if isinstance(one.tokens, torch.Tensor) else one.tokens)
        torch.index_select(self.embedding_VD, 0, torch.tensor(ids), out=out_ND)
        first = 0
        for one in chunks:
            if isinstance(one.tokens, torch.Tensor):
                out_ND[first : first + len(one)] = one.tokens
            first += len(one)

    def run_layers(self, buffers: Buffers, inputs: StepInputs) -> None:
        """Run all blocks over the stream, the last one up to what its tokens attend to."""
        change_ND: torch.Tensor | None = None
        for layer, block in enumerate(self._blocks):
            self.ops.add_norm(buffers.stream_ND, change_ND, block.attention_norm_D, buffers.normed_ND)
            self._attend(layer, block, buffers, inputs)
            if layer < self.num_layers - 1:
                change_ND = self._finish_block(layer, block, buffers, inputs)

    def finish_layers(self, buffers: Buffers, inputs: StepInputs) -> torch.Tensor:
        """Run the rest of the last block, for all tokens or some; return its change [N, D], which is still to
        be added to the stream."""
        return self._finish_block(self.num_layers - 1, self._blocks[-1], buffers, inputs)

    def run_head(
        self,
        stream_RD: torch.Tensor,
        change_RD: torch.Tensor,
        normed_RD: torch.Tensor,
        out_RV: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the logits [R, V] of rows of the stream, in the weights' type; out as for `PackedLinear`."""
        self.ops.add_norm(stream_RD, change_RD, self._norm_D, normed_RD)
        return self._head(normed_RD, out_RV)

    def _attend(self, layer: int, block: _Block, buffers: Buffers, inputs: StepInputs) -> None:
        normed_ND, attended_NK = buffers.normed_ND, buffers.attended_NK
        qkv_NE = block.attention_in(normed_ND, buffers.qkv_NE, inputs.following(layer, ATTENTION_IN))
        self._add_low_ranks(qkv_NE, normed_ND, inputs, layer, ATTENTION_IN)
        self.ops.attend(qkv_NE, inputs.tokens, self.pages, layer, attended_NK)
        if inputs.chunks is not None:
            self.ops.attend_chunks(qkv_NE, inputs.tokens, inputs.chunks, self.pages, layer, attended_NK)

    def _finish_block(self, layer: int, block: _Block, buffers: Buffers, inputs: StepInputs) -> torch.Tensor:
        """Run a block from what its tokens attend to on."""
        normed_ND, attended_NK, hidden_NF = buffers.normed_ND, buffers.attended_NK, buffers.hidden_NF
        out_ND = block.attention_out(attended_NK, buffers.change_ND, inputs.following(layer, ATTENTION_OUT))
        self._add_low_ranks(out_ND, attended_NK, inputs, layer, ATTENTION_OUT)
        self._add_bottlenecks(out_ND, normed_ND, inputs, layer, 0)
        self.ops.add_norm(buffers.stream_ND, out_ND, block.feed_forward_norm_D, normed_ND)
        following = [inputs.following(layer, sites) for sites in (FEED_FORWARD_IN, FEED_FORWARD_OUT)]
        gate_up_NF = block.feed_forward_in(normed_ND, buffers.gate_up_NF, following[0])
        self._add_low_ranks(gate_up_NF, normed_ND, inputs, layer, FEED_FORWARD_IN)
        self.ops.gate(gate_up_NF, hidden_NF)
        out_ND = block.feed_forward_out(hidden_NF, buffers.change_ND, following[1])
        self._add_low_ranks(out_ND, hidden_NF, inputs, layer, FEED_FORWARD_OUT)
        self._add_bottlenecks(out_ND, normed_ND, inputs, layer, 1)
        return out_ND

    def _add_low_ranks(
        self,
        out_NO: torch.Tensor,
        x_NK: torch.Tensor,
        inputs: StepInputs,
        layer: int,
        sites: slice,
    ) -> None:
        if inputs.rows.has_low_ranks:
            self.ops.add_low_rank(out_NO, x_NK, inputs.rows, layer, sites)
        if inputs.chunks is not None:
            self.ops.add_low_rank_to_chunks(out_NO, x_NK, inputs.chunks, layer, sites)

    def _add_bottlenecks(
        self, out_ND: torch.Tensor, input_ND: torch.Tensor, inputs: StepInputs, layer: int, half: int
    ) -> None:
        if inputs.rows.has_bottlenecks:
            self.ops.add_bottleneck(out_ND, input_ND, inputs.rows, layer, half)
        if inputs.chunks is None:
            return
        for adapter, tokens in zip(inputs.chunks.adapters, inputs.chunks.tokens, strict=True):
            site = None if adapter is None else adapter.bottlenecks[layer][half]
            if site is not None:
                site.add_to(out_ND[tokens], input_ND[tokens])

    def _logits(
        self, buffers: Buffers, inputs: StepInputs, chunks: Sequence[Chunk], begins: dict[int, int]
    ) -> Logits:
        """Run the last block to its end, for the wanted logits alone unless some are within a chunk.

        `begins` are the chunks' first rows by their ids.
        """
        wanted = [begins[id(one)] + place for one in chunks for place in one.wanted]
        if not wanted:
            return Logits(self.embedding_VD.new_empty(0, self.vocabulary_size), [])
        wanted_R = torch.tensor(wanted)
        if any(one.wants_all_logits or one.num_first_logits for one in chunks):
            # As the chunk that they are: a model is verified by what the kernels of chunks compute.
            change_ND = self.finish_layers(buffers, inputs)
            stream_RD, change_RD = buffers.stream_ND[wanted_R], change_ND[wanted_R]
        else:
            own = self.make_buffers(len(wanted))
            for name in ("stream_ND", "normed_ND", "attended_NK"):
                torch.index_select(getattr(buffers, name), 0, wanted_R, out=getattr(own, name))
            rows = SingleRows([one.adapter for one in chunks for _ in one.wanted])
            # Nothing attends any more: the tokens, which are others than these, are not read.
            stream_RD, change_RD = own.stream_ND, self.finish_layers(own, StepInputs(rows, inputs.tokens))
        return Logits.of(self.run_head(stream_RD, change_RD, torch.empty_like(stream_RD)))

    def _attends_at_once(self, chunk: Chunk) -> bool:
        return chunk.first + len(chunk) > self.ops.max_alone
