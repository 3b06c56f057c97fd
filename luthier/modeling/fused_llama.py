"""A fast path for LoRA on Llama-shaped models: the same function as the plain one, with fewer passes.

Layers that share an input (q, k, v; gate, up) run fused with their low-rank updates (fused_layers.py).
Short rows attend by batched products, longer ones by torch's own attention. The parameters stay PEFT's
own: what is trained here is saved and loaded by the plain path. `fuse` returns None for everything that
it does not know, and the plain path runs.

Legend: N tokens with their padding (B rows of T), D hidden size.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from luthier.modeling.fused_layers import (
    BatchedAttention,
    FusedLinear,
    GatedSilu,
    LinearAdd,
    NormLinear,
    Rotate,
)

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

# Longest rows, in tokens, for which batched products beat torch's attention on the CPUs measured.
_MAX_BATCHED_ATTENTION = 384


@dataclass(frozen=True)
class _Block:
    """One decoder layer: its norms (weights of size D) and its four fused layers."""

    input_norm: nn.Module
    attention_in: FusedLinear
    attention_out: FusedLinear
    feed_forward_norm: nn.Module
    feed_forward_in: FusedLinear
    feed_forward_out: FusedLinear

    @property
    def fused(self) -> tuple[FusedLinear, ...]:
        return (self.attention_in, self.attention_out, self.feed_forward_in, self.feed_forward_out)


class FusedLlama:
    """Runs a LoRA-tuned Llama up to its output layer, by fused layers.

    Args:
        causal_lm: the base with PEFT's layers in it.
        adapter: name of the adapter that is trained.
    """

    def __init__(self, causal_lm: "LlamaForCausalLM", adapter: str = "default") -> None:
        self._body = causal_lm.model
        config = causal_lm.config
        self._num_heads = config.num_attention_heads
        self._num_kv_heads = config.num_key_value_heads
        self._head_size = causal_lm.model.layers[0].self_attn.head_dim
        self._blocks = [
            _Block(
                input_norm=layer.input_layernorm,
                attention_in=FusedLinear(
                    [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj], adapter
                ),
                attention_out=FusedLinear([layer.self_attn.o_proj], adapter),
                feed_forward_norm=layer.post_attention_layernorm,
                feed_forward_in=FusedLinear([layer.mlp.gate_proj, layer.mlp.up_proj], adapter),
                feed_forward_out=FusedLinear([layer.mlp.down_proj], adapter),
            )
            for layer in causal_lm.model.layers
        ]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All parameters that this path gives gradients to."""
        return [
            parameter for block in self._blocks for fused in block.fused for parameter in fused.parameters
        ]

    def hidden_states(self, token_ids_BT: torch.Tensor) -> torch.Tensor:
        """Run rows padded on the right.

        Args:
            token_ids_BT: int64.

        Returns:
            hidden_BTD after the last norm, in the weights' type.
        """
        num_rows, num_tokens = token_ids_BT.shape
        x_BTD = self._body.embed_tokens(token_ids_BT)
        positions = torch.arange(num_tokens, device=token_ids_BT.device)[None]
        cosine, sine = self._body.rotary_emb(x_BTD, position_ids=positions)
        half = self._head_size // 2
        cosine, sine = cosine[:, :, None, :half], sine[:, :, None, :half]
        bias = x_BTD.new_full((num_tokens, num_tokens), float("-inf")).triu_(1)
        x_ND = x_BTD.reshape(num_rows * num_tokens, -1)
        for block in self._blocks:
            for fused in block.fused:
                fused.refresh()
            x_ND = self._attend(block, x_ND, num_rows, cosine, sine, bias)
            x_ND = self._feed_forward(block, x_ND)
        return self._body.norm(x_ND).view(num_rows, num_tokens, -1)

    def _attend(
        self,
        block: _Block,
        x_ND: torch.Tensor,
        num_rows: int,
        cosine: torch.Tensor,
        sine: torch.Tensor,
        bias: torch.Tensor,
    ) -> torch.Tensor:
        norm, fused = block.input_norm, block.attention_in
        qkv = NormLinear.apply(x_ND, norm.weight, norm.variance_epsilon, fused, *fused.parameters)
        qkv_BTHC = qkv.view(num_rows, -1, self._num_heads + 2 * self._num_kv_heads, self._head_size)
        num_rotated = self._num_heads + self._num_kv_heads
        rotated = Rotate.apply(qkv_BTHC[:, :, :num_rotated], cosine, sine)
        query, key = rotated[:, :, : self._num_heads], rotated[:, :, self._num_heads :]
        value = qkv_BTHC[:, :, num_rotated:]
        if bias.shape[0] <= _MAX_BATCHED_ATTENTION:
            attended = self._attend_batched(query, key, value, bias)
        else:
            attended = nn.functional.scaled_dot_product_attention(
                query.transpose(1, 2),
                key.transpose(1, 2),
                value.transpose(1, 2),
                is_causal=True,
                enable_gqa=True,
            ).transpose(1, 2)
        fused = block.attention_out
        return LinearAdd.apply(attended.reshape(x_ND.shape[0], -1), x_ND, fused, *fused.parameters)

    def _attend_batched(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor
    ) -> torch.Tensor:
        num_rows, num_tokens = key.shape[:2]
        groups = self._num_heads // self._num_kv_heads
        shape = (num_rows, num_tokens, self._num_kv_heads, groups, self._head_size)
        query = query.view(shape).permute(0, 2, 3, 1, 4).reshape(-1, groups * num_tokens, self._head_size)
        key = key.transpose(1, 2).reshape(-1, num_tokens, self._head_size)
        value = value.transpose(1, 2).reshape(-1, num_tokens, self._head_size)
        attended = BatchedAttention.apply(query, key, value, bias, self._head_size**-0.5)
        attended = attended.view(num_rows, self._num_kv_heads, groups, num_tokens, self._head_size)
        return attended.permute(0, 3, 1, 2, 4)

    @staticmethod
    def _feed_forward(block: _Block, x_ND: torch.Tensor) -> torch.Tensor:
        norm, fused = block.feed_forward_norm, block.feed_forward_in
        gate_up = NormLinear.apply(x_ND, norm.weight, norm.variance_epsilon, fused, *fused.parameters)
        fused = block.feed_forward_out
        return LinearAdd.apply(GatedSilu.apply(gate_up), x_ND, fused, *fused.parameters)


def fuse(causal_lm: nn.Module, adapter: str = "default") -> FusedLlama | None:
    """Return the fast path for a model, or None when it is not of the kind that the fast path knows.

    Args:
        causal_lm: the base with PEFT's layers in it.
        adapter: name of the adapter that is trained.

    Returns:
        The fast path over the same parameters.
    """
    from transformers import LlamaForCausalLM

    if type(causal_lm) is not LlamaForCausalLM:
        return None
    config = causal_lm.config
    if config.hidden_act != "silu" or config.attention_bias or config.mlp_bias or config.attention_dropout:
        return None
    if config.rope_parameters.get("rope_type") not in {"default", "linear", "llama3"}:
        return None
    if not all(_is_known(module, adapter) for module in causal_lm.model.layers.modules()):
        return None
    return FusedLlama(causal_lm, adapter)


def _is_known(module: nn.Module, adapter: str) -> bool:
    """Whether a module is no LoRA layer, or a plain one without dropout and without a variant (DoRA)."""
    if not hasattr(module, "lora_A"):
        return True
    if adapter not in module.lora_A or not isinstance(module.base_layer, nn.Linear):
        return False
    return (
        not module.lora_variant
        and not module.lora_bias[adapter]
        and isinstance(module.lora_dropout[adapter], nn.Identity)
    )
