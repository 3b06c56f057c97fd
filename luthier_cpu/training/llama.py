"""A fast path for Llama-shaped models: the same function as the plain one, with fewer passes over memory.

Layers that share an input (q, k, v; gate, up) run fused with their low-rank updates (linear.py);
attention is attention.py. Any method runs here whose trained parameters are LoRA's, bottlenecks
after a half, virtual tokens, or the weights themselves. The parameters stay the method's own: what is
trained here is saved and loaded by the plain path. `fuse` returns None for everything that it does not
know, and the plain path runs.

Legend: N tokens with their padding (B rows of T), D hidden size, V virtual tokens, M wanted tokens.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from luthier.methods import Attached, Method
from luthier_cpu.training.attention import Attention, Heads
from luthier_cpu.training.layers import (
    BottleneckAdd,
    FusedBottleneck,
    LinearAdd,
    NormLinear,
)
from luthier_cpu.training.linear import FusedLinear

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

_KNOWN_PARTS = {
    "self_attn",
    "mlp",
    "input_layernorm",
    "post_attention_layernorm",
    "attention_bottleneck",
    "feed_forward_bottleneck",
}


@dataclass(frozen=True)
class _Block:
    """One decoder layer: its norms (weights of size D), its four fused layers, its bottlenecks."""

    input_norm: nn.Module
    attention_in: FusedLinear
    attention_out: FusedLinear
    attention_bottleneck: FusedBottleneck | None
    feed_forward_norm: nn.Module
    feed_forward_in: FusedLinear
    feed_forward_out: FusedLinear
    feed_forward_bottleneck: FusedBottleneck | None

    @property
    def fused(self) -> tuple[FusedLinear, ...]:
        return (self.attention_in, self.attention_out, self.feed_forward_in, self.feed_forward_out)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All that this block gives gradients to."""
        found = [parameter for fused in self.fused for parameter in fused.parameters]
        for bottleneck in (self.attention_bottleneck, self.feed_forward_bottleneck):
            found += bottleneck.parameters if bottleneck else []
        norms = (self.input_norm.weight, self.feed_forward_norm.weight)
        return found + [weight for weight in norms if weight.requires_grad]


class FusedLlama:
    """Runs a tuned Llama up to its output layer, by fused layers.

    Args:
        adapter: name of the adapter that is trained, where PEFT's layers are in it.
    """

    def __init__(self, method: Method, attached: Attached, adapter: str = "default") -> None:
        self._method, self._attached = method, attached
        causal_lm: LlamaForCausalLM = attached.causal_lm
        self._body = causal_lm.model
        config = causal_lm.config
        self._num_heads = config.num_attention_heads
        self._num_kv_heads = config.num_key_value_heads
        self._head_size = causal_lm.model.layers[0].self_attn.head_dim
        self._blocks = [_build_block(layer, adapter) for layer in causal_lm.model.layers]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters in the base's own modules that this path gives gradients to."""
        outer = [self._body.embed_tokens.weight, self._body.norm.weight]
        found = [parameter for block in self._blocks for parameter in block.parameters]
        return found + [weight for weight in outer if weight.requires_grad]

    def wanted_hidden_states(
        self, token_ids_BT: torch.Tensor, wanted_BT: torch.Tensor, *, num_shared: int = 0
    ) -> torch.Tensor:
        """Run rows padded on the right for some of their tokens.

        Of all others the last layer makes keys and values, and no more.

        Args:
            token_ids_BT: int64.
            wanted_BT: bool, of the tokens that are not shared.
            num_shared: how many tokens all rows have alike at their beginning, fewer than T; they are
                computed once.

        Returns:
            hidden_MD after the last norm, in the weights' type, in the order of the rows.

        Raises:
            ValueError: when `wanted_BT` is not of the rows' own tokens.
        """
        num_rows, num_tokens = token_ids_BT.shape
        if wanted_BT.shape != (num_rows, num_tokens - num_shared):
            raise ValueError(
                f"Tokens are wanted of {tuple(wanted_BT.shape)}, the rows' own are "
                f"{(num_rows, num_tokens - num_shared)}."
            )
        if not wanted_BT.any():
            weight_VD = self._body.embed_tokens.weight
            return weight_VD.new_empty(0, weight_VD.shape[1])
        return self._run(token_ids_BT, num_shared, wanted_BT.flatten().nonzero()[:, 0])

    def _run(self, token_ids_BT: torch.Tensor, num_shared: int, wanted_M: torch.Tensor) -> torch.Tensor:
        """Return the hidden states of those wanted among the tokens that are not shared."""
        own_BT = token_ids_BT[:, num_shared:]
        x_ND = self._body.embed_tokens(torch.cat([token_ids_BT[0, :num_shared], own_BT.reshape(-1)]))
        embedded_VD = self._method.virtual_embeddings(self._attached)
        if embedded_VD is not None:
            # Virtual tokens are shared by their nature.
            x_ND = torch.cat([embedded_VD.to(x_ND.dtype), x_ND])
            num_shared += len(embedded_VD)
        pairs = self._method.virtual_key_values(self._attached)
        num_before = 0 if pairs is None else pairs[0][0].shape[1]
        turning = self._turning(x_ND, num_before, num_before + num_shared + own_BT.shape[1])
        # As the optimizer left them.
        with torch.no_grad():
            for fused in (fused for block in self._blocks for fused in block.fused):
                fused.read_updates()
        for number, block in enumerate(self._blocks):
            key, value = (None, None) if pairs is None else pairs[number]
            width = block.attention_out.width
            sizes = (self._num_heads, self._num_kv_heads, self._head_size)
            attended_NK = _attend(block, x_ND, Heads(*sizes, *turning, width, num_shared), key, value)
            if block is self._blocks[-1]:
                # Nothing attends to what it gives.
                attended_NK, x_ND = attended_NK[num_shared:], x_ND[num_shared:]
                attended_NK, x_ND = (one.index_select(0, wanted_M) for one in (attended_NK, x_ND))
            x_ND = _leave_attention(block, attended_NK, x_ND)
            x_ND = _feed_forward(block, x_ND)
        return self._body.norm(x_ND)

    def _turning(self, x_ND: torch.Tensor, begin: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosines and sines, float32 [positions, half a head], of positions from `begin` to `end`."""
        positions_1T = torch.arange(begin, end, device=x_ND.device)[None]
        half = self._head_size // 2
        cosine, sine = self._body.rotary_emb(x_ND[None], position_ids=positions_1T)
        return cosine[0, :, :half].float().contiguous(), sine[0, :, :half].float().contiguous()


def _build_block(layer: nn.Module, adapter: str) -> _Block:
    bottlenecks = [
        FusedBottleneck(getattr(layer, name)) if hasattr(layer, name) else None
        for name in ("attention_bottleneck", "feed_forward_bottleneck")
    ]
    attention, feed_forward = layer.self_attn, layer.mlp
    return _Block(
        input_norm=layer.input_layernorm,
        attention_in=FusedLinear([attention.q_proj, attention.k_proj, attention.v_proj], adapter),
        attention_out=FusedLinear([attention.o_proj], adapter),
        attention_bottleneck=bottlenecks[0],
        feed_forward_norm=layer.post_attention_layernorm,
        feed_forward_in=FusedLinear([feed_forward.gate_proj, feed_forward.up_proj], adapter),
        feed_forward_out=FusedLinear([feed_forward.down_proj], adapter),
        feed_forward_bottleneck=bottlenecks[1],
    )


def _attend(
    block: _Block, x_ND: torch.Tensor, heads: Heads, key: torch.Tensor | None, value: torch.Tensor | None
) -> torch.Tensor:
    norm, fused = block.input_norm, block.attention_in
    qkv_NE = NormLinear.apply(x_ND, norm.weight, norm.variance_epsilon, fused, *fused.parameters)
    return Attention.apply(qkv_NE, key, value, heads)


def _leave_attention(block: _Block, attended_NK: torch.Tensor, x_ND: torch.Tensor) -> torch.Tensor:
    return _add(block.attention_out, block.attention_bottleneck, attended_NK, x_ND, is_gated=False)


def _feed_forward(block: _Block, x_ND: torch.Tensor) -> torch.Tensor:
    norm, fused = block.feed_forward_norm, block.feed_forward_in
    gate_up_NF = NormLinear.apply(x_ND, norm.weight, norm.variance_epsilon, fused, *fused.parameters)
    return _add(block.feed_forward_out, block.feed_forward_bottleneck, gate_up_NF, x_ND, is_gated=True)


def _add(
    fused: FusedLinear,
    bottleneck: FusedBottleneck | None,
    inner: torch.Tensor,
    x_ND: torch.Tensor,
    *,
    is_gated: bool,
) -> torch.Tensor:
    """Add a half of a block, with its bottleneck where it has one, to the residual stream."""
    if bottleneck is None:
        return LinearAdd.apply(inner, x_ND, fused, is_gated, *fused.parameters)
    half_ND = LinearAdd.apply(inner, None, fused, is_gated, *fused.parameters)
    return BottleneckAdd.apply(half_ND, x_ND, bottleneck.activation, *bottleneck.parameters)


def fuse(method: Method, attached: Attached, adapter: str = "default") -> FusedLlama | None:
    """Return the fast path for a tuned model, or None when it is not of the kind that the fast path knows.

    Args:
        adapter: name of the adapter that is trained, where PEFT's layers are in it.

    Returns:
        The fast path over the same parameters; it gives gradients to every trained one.
    """
    if not is_known_base(attached.causal_lm, adapter):
        return None
    fused = FusedLlama(method, attached, adapter)
    # An output layer of its own gets its gradient from the loss (luthier/modeling/head_loss.py).
    head = attached.causal_lm.get_output_embeddings()
    reached = {id(parameter) for parameter in [*fused.parameters, head.weight]}
    trained = [parameter for _, parameter in attached.named_trained_parameters()]
    has_virtual = method.virtual_embeddings(attached) is not None
    if has_virtual or method.virtual_key_values(attached) is not None:
        # Virtual tokens and what makes them are beside the base; their method differentiates them itself.
        inner = {id(parameter) for parameter in attached.causal_lm.parameters()}
        trained = [parameter for parameter in trained if id(parameter) in inner]
    return fused if all(id(parameter) in reached for parameter in trained) else None


def is_known_base(causal_lm: nn.Module, adapter: str) -> bool:
    """Whether a model is a Llama whose every part is one that the fused layers know."""
    from transformers import LlamaForCausalLM

    if type(causal_lm) is not LlamaForCausalLM:
        return False
    config = causal_lm.config
    if config.hidden_act != "silu" or config.attention_bias or config.mlp_bias or config.attention_dropout:
        return False
    if config.rope_parameters.get("rope_type") not in {"default", "linear", "llama3"}:
        return False
    layers = causal_lm.model.layers
    if not all(name in _KNOWN_PARTS for layer in layers for name, _ in layer.named_children()):
        return False
    return all(_is_known(module, adapter) for module in layers.modules())


def _is_known(module: nn.Module, adapter: str) -> bool:
    """Whether a module is none that changes what the layers do, or one that the fused layers know."""
    if hasattr(module, "placement") and hasattr(module, "down"):
        return module.placement in {"houlsby", "pfeiffer"} and isinstance(module.dropout, nn.Identity)
    if isinstance(module, nn.Linear) and type(module) is not nn.Linear:
        # A quantised layer, say, whose weight is no matrix [outputs, inputs].
        return False
    if not hasattr(module, "lora_A"):
        return True
    if adapter not in module.lora_A or type(module.base_layer) is not nn.Linear:
        return False
    return (
        not module.lora_variant
        and not module.lora_bias[adapter]
        and isinstance(module.lora_dropout[adapter], nn.Identity)
    )
