"""The blocks of a packed base, and the memory of their weights.

Legend: D hidden size, K inputs and O outputs of a layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from luthier_cpu.codegen.page_memory import take_large
from luthier_cpu.decode.linear import PackedLinear
from luthier_cpu.gemm.products import can_tile, tiled_bytes


@dataclass(frozen=True, eq=False)
class Block:
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


def linears_of(layer: torch.nn.Module) -> list[torch.Tensor]:
    """Return the seven weights of a Llama's block, in the order in which a step reads them."""
    attention, feed_forward = layer.self_attn, layer.mlp
    inward, outward = (attention.q_proj, attention.k_proj, attention.v_proj), (attention.o_proj,)
    linears = (*inward, *outward, feed_forward.gate_proj, feed_forward.up_proj, feed_forward.down_proj)
    return [one.weight.detach() for one in linears]


def pack_block(layer: torch.nn.Module, memory: WeightMemory) -> Block:
    """Return a Llama's block with its weights copied into memory; the layer's own are given back."""
    query, key, value, out, gate, up, down = linears_of(layer)
    block = Block(
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
