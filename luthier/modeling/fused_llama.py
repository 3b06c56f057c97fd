"""A fast path for LoRA on Llama-shaped models: the same function as the plain one, with fewer passes.

Layers that share an input (q, k, v; gate, up) are one product. The low-rank update rides in the same
product: the input is widened by `u = x A'`, the weight by `scale * B`, so the forward product gives
`x W' + scale u B'` at once, and the backward one gives the gradients of x and u at once. Backward passes
are written by hand. Short rows attend by batched products, longer ones by torch's own attention.

The parameters stay PEFT's own; what is trained here is saved and loaded by the plain path. `fuse` returns
None for everything that it does not know, and the plain path runs.

Legend: N tokens with their padding (B rows of T), D inputs, K inputs widened by the ranks, O outputs,
R ranks side by side, H heads of size C, G query heads per key head.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

# Products run well on rows of whole cache lines.
_ALIGN = 32
# Longest rows, in tokens, for which batched products beat torch's attention on the CPUs measured.
_MAX_BATCHED_ATTENTION = 384


@dataclass(frozen=True)
class _LowRank:
    """One layer's update inside a fused layer: its parameters, scale, and where they go."""

    a_RD: nn.Parameter
    b_OR: nn.Parameter
    scale: float
    outputs: slice
    ranks: slice


class FusedLinear:
    """Linear layers that share an input, as one product with their low-rank updates in it.

    The plain layers' weights become views of this one's, so that no weight lies in memory twice.

    Args:
        layers: PEFT's LoRA layers, or bare linear ones.
        adapter: name of the adapter that is trained.
    """

    def __init__(self, layers: Sequence[nn.Module], adapter: str) -> None:
        bases = [getattr(layer, "base_layer", layer) for layer in layers]
        self.num_inputs = bases[0].in_features
        self.low_ranks: list[_LowRank] = []
        output, rank = 0, 0
        for layer, base in zip(layers, bases, strict=True):
            outputs = slice(output, output + base.out_features)
            output = outputs.stop
            if not hasattr(layer, "lora_A"):
                continue
            ranks = slice(rank, rank + layer.r[adapter])
            rank = ranks.stop
            self.low_ranks.append(
                _LowRank(
                    layer.lora_A[adapter].weight,
                    layer.lora_B[adapter].weight,
                    float(layer.scaling[adapter]),
                    outputs,
                    ranks,
                )
            )
        width = -(-(self.num_inputs + rank) // _ALIGN) * _ALIGN
        first = bases[0].weight
        self.weight_OK = first.new_zeros(output, width)
        self.a_RD = first.new_zeros(width - self.num_inputs, self.num_inputs)
        start = 0
        for base in bases:
            part = self.weight_OK[start : start + base.out_features, : self.num_inputs]
            part.copy_(base.weight)
            base.weight.data = part
            start += base.out_features
        self.parameters: list[nn.Parameter] = [p for low in self.low_ranks for p in (low.a_RD, low.b_OR)]

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the parameters as the optimizer left them, in the type of the weights."""
        for low in self.low_ranks:
            self.a_RD[low.ranks].copy_(low.a_RD)
            columns = slice(self.num_inputs + low.ranks.start, self.num_inputs + low.ranks.stop)
            self.weight_OK[low.outputs, columns].copy_(low.b_OR * low.scale)

    def widen(self, x_ND: torch.Tensor) -> torch.Tensor:
        """Return x_NK: the input with `x A'` beside it."""
        if self.a_RD.shape[0] == 0:
            return x_ND
        x_NK = x_ND.new_empty(x_ND.shape[0], self.weight_OK.shape[1])
        x_NK[:, : self.num_inputs] = x_ND
        x_NK[:, self.num_inputs :] = torch.mm(x_ND, self.a_RD.t())
        return x_NK

    def backward(
        self, gradient_NO: torch.Tensor, x_NK: torch.Tensor
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the gradient of x_ND, and those of the parameters in their order."""
        gradient_NK = torch.mm(gradient_NO, self.weight_OK)
        if self.a_RD.shape[0] == 0:
            return gradient_NK, []
        gradient_u_NR = gradient_NK[:, self.num_inputs :].contiguous()
        x_ND, u_NR = x_NK[:, : self.num_inputs], x_NK[:, self.num_inputs :].contiguous()
        gradient_ND = torch.addmm(gradient_NK[:, : self.num_inputs], gradient_u_NR, self.a_RD)
        gradient_a_RD = torch.mm(gradient_u_NR.t(), x_ND)
        gradient_b_RO = torch.mm(u_NR.t(), gradient_NO)
        gradients: list[torch.Tensor] = []
        for low in self.low_ranks:
            gradients.append(gradient_a_RD[low.ranks].to(low.a_RD.dtype))
            gradients.append(gradient_b_RO[low.ranks, low.outputs].t().to(low.b_OR.dtype) * low.scale)
        return gradient_ND, gradients


class _NormLinear(torch.autograd.Function):
    """A fused layer after an RMS norm (Zhang & Sennrich 2019, arXiv 1910.07467)."""

    @staticmethod
    def forward(
        context: Any,
        x_ND: torch.Tensor,
        weight_D: torch.Tensor,
        epsilon: float,
        fused: FusedLinear,
        *parameters: nn.Parameter,  # noqa: ARG004
    ) -> torch.Tensor:
        wide = x_ND.float()
        inverse_N1 = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
        normed_ND = weight_D * (wide * inverse_N1).to(x_ND.dtype)
        x_NK = fused.widen(normed_ND)
        context.fused = fused
        context.save_for_backward(x_ND, weight_D, inverse_N1, x_NK)
        return torch.mm(x_NK, fused.weight_OK.t())

    @staticmethod
    def backward(context: Any, *gradients_out: torch.Tensor) -> tuple[Any, ...]:
        x_ND, weight_D, inverse_N1, x_NK = context.saved_tensors
        gradient_ND, gradients = context.fused.backward(gradients_out[0], x_NK)
        scaled_ND = gradient_ND.float().mul_(weight_D.float())
        unit_ND = x_ND.float().mul_(inverse_N1)
        shared_N1 = (scaled_ND * unit_ND).mean(-1, keepdim=True)
        gradient_x_ND = scaled_ND.sub_(unit_ND.mul_(shared_N1)).mul_(inverse_N1)
        return (gradient_x_ND.to(x_ND.dtype), None, None, None, *gradients)


class _LinearAdd(torch.autograd.Function):
    """A fused layer whose output is added to the residual stream."""

    @staticmethod
    def forward(
        context: Any,
        x_ND: torch.Tensor,
        residual_NO: torch.Tensor,
        fused: FusedLinear,
        *parameters: nn.Parameter,  # noqa: ARG004
    ) -> torch.Tensor:
        x_NK = fused.widen(x_ND)
        context.fused = fused
        context.save_for_backward(x_NK)
        return torch.addmm(residual_NO, x_NK, fused.weight_OK.t())

    @staticmethod
    def backward(context: Any, *gradients_out: torch.Tensor) -> tuple[Any, ...]:
        (x_NK,) = context.saved_tensors
        gradient_ND, gradients = context.fused.backward(gradients_out[0], x_NK)
        return (gradient_ND, gradients_out[0], None, *gradients)


class _GatedSilu(torch.autograd.Function):
    """`silu(gate) * up` of a fused gate and up (Shazeer 2020, arXiv 2002.05202)."""

    @staticmethod
    def forward(context: Any, gate_up_NO: torch.Tensor) -> torch.Tensor:
        context.save_for_backward(gate_up_NO)
        gate, up = gate_up_NO.chunk(2, dim=-1)
        return nn.functional.silu(gate).mul_(up)

    @staticmethod
    def backward(context: Any, *gradients_out: torch.Tensor) -> torch.Tensor:
        (gate_up_NO,) = context.saved_tensors
        gate, up = gate_up_NO.chunk(2, dim=-1)
        gradient = gradients_out[0]
        result_NO = torch.empty_like(gate_up_NO)
        gradient_gate, gradient_up = result_NO.chunk(2, dim=-1)
        torch.mul(gradient, nn.functional.silu(gate), out=gradient_up)
        gradient_gate.copy_(torch.ops.aten.silu_backward(gradient * up, gate))
        return result_NO


class _BatchedAttention(torch.autograd.Function):
    """Causal attention by three batched products; the query heads of one key head are its rows."""

    @staticmethod
    def forward(
        context: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        scores = torch.bmm(query, key.transpose(1, 2))
        num_pairs, num_keys = scores.shape[0], key.shape[1]
        scores = scores.view(num_pairs, -1, num_keys, num_keys).mul_(scale).add_(bias)
        weights = torch.softmax(scores, dim=-1).view(num_pairs, -1, num_keys)
        context.scale = scale
        context.save_for_backward(query, key, value, weights)
        return torch.bmm(weights, value)

    @staticmethod
    def backward(context: Any, *gradients_out: torch.Tensor) -> tuple[Any, ...]:
        query, key, value, weights = context.saved_tensors
        gradient = gradients_out[0]
        gradient_value = torch.bmm(weights.transpose(1, 2), gradient)
        gradient_weights = torch.bmm(gradient, value.transpose(1, 2))
        gradient_scores = torch.ops.aten._softmax_backward_data(gradient_weights, weights, -1, weights.dtype)
        gradient_scores.mul_(context.scale)
        gradient_query = torch.bmm(gradient_scores, key)
        gradient_key = torch.bmm(gradient_scores.transpose(1, 2), query)
        return gradient_query, gradient_key, gradient_value, None, None


class _Rotate(torch.autograd.Function):
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864); its gradient turns the other way."""

    @staticmethod
    def forward(context: Any, x_BTHC: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
        context.save_for_backward(cosine, sine)
        return _rotate(x_BTHC, cosine, sine)

    @staticmethod
    def backward(context: Any, *gradients_out: torch.Tensor) -> tuple[Any, ...]:
        cosine, sine = context.saved_tensors
        return _rotate(gradients_out[0], cosine, -sine), None, None


def _rotate(x_BTHC: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Turn pairs (c, c + C/2) by their angles; `cosine` and `sine` are of shape [1, T, 1, C/2]."""
    half = x_BTHC.shape[-1] // 2
    first, second = x_BTHC[..., :half], x_BTHC[..., half:]
    result = torch.empty(x_BTHC.shape, dtype=x_BTHC.dtype, device=x_BTHC.device)
    torch.sub(first * cosine, second * sine, out=result[..., :half])
    torch.add(second * cosine, first * sine, out=result[..., half:])
    return result


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
        qkv = _NormLinear.apply(x_ND, norm.weight, norm.variance_epsilon, fused, *fused.parameters)
        qkv_BTHC = qkv.view(num_rows, -1, self._num_heads + 2 * self._num_kv_heads, self._head_size)
        num_rotated = self._num_heads + self._num_kv_heads
        rotated = _Rotate.apply(qkv_BTHC[:, :, :num_rotated], cosine, sine)
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
        return _LinearAdd.apply(attended.reshape(x_ND.shape[0], -1), x_ND, fused, *fused.parameters)

    def _attend_batched(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor
    ) -> torch.Tensor:
        num_rows, num_tokens = key.shape[:2]
        groups = self._num_heads // self._num_kv_heads
        shape = (num_rows, num_tokens, self._num_kv_heads, groups, self._head_size)
        query = query.view(shape).permute(0, 2, 3, 1, 4).reshape(-1, groups * num_tokens, self._head_size)
        key = key.transpose(1, 2).reshape(-1, num_tokens, self._head_size)
        value = value.transpose(1, 2).reshape(-1, num_tokens, self._head_size)
        attended = _BatchedAttention.apply(query, key, value, bias, self._head_size**-0.5)
        attended = attended.view(num_rows, self._num_kv_heads, groups, num_tokens, self._head_size)
        return attended.permute(0, 3, 1, 2, 4)

    @staticmethod
    def _feed_forward(block: _Block, x_ND: torch.Tensor) -> torch.Tensor:
        norm, fused = block.feed_forward_norm, block.feed_forward_in
        gate_up = _NormLinear.apply(x_ND, norm.weight, norm.variance_epsilon, fused, *fused.parameters)
        fused = block.feed_forward_out
        return _LinearAdd.apply(_GatedSilu.apply(gate_up), x_ND, fused, *fused.parameters)


def fuse(causal_lm: nn.Module, adapter: str = "default") -> FusedLlama | None:
    """Return the fast path for a model, or None when it is not of the kind that the fast path knows.

    Args:
        causal_lm: the base with PEFT's layers in it.
        adapter: name of the adapter that is trained.
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
