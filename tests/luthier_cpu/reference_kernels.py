"""What the compiled kernels of training compute, in torch's operators: the functions of `codegen.kernels`.

Legend as there. Gradients are autograd's, in float32.
"""

import torch
from torch.nn import functional

from luthier.modeling.head_loss import OutputLayer

softmax_loss_ = OutputLayer(torch.empty(0, 0)).softmax_loss_


def rms_norm(
    x_ND: torch.Tensor, weight_D: torch.Tensor, epsilon: float, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    inverse_N = torch.rsqrt(x_ND.float().pow(2).mean(-1) + epsilon)
    out_ND = weight_D * (x_ND.float() * inverse_N[:, None]).to(x_ND.dtype)
    return functional.pad(out_ND, (0, width - x_ND.shape[1])), inverse_N


def rms_norm_backward(
    gradient_NK: torch.Tensor, x_ND: torch.Tensor, weight_D: torch.Tensor, inverse_N: torch.Tensor
) -> torch.Tensor:
    scaled_ND = gradient_NK[:, : x_ND.shape[1]].float() * weight_D.float()
    unit_ND = x_ND.float() * inverse_N[:, None]
    shared_N1 = (scaled_ND * unit_ND).mean(-1, keepdim=True)
    return ((scaled_ND - unit_ND * shared_N1) * inverse_N[:, None]).to(x_ND.dtype)


def gated_silu(gate_up_NF: torch.Tensor, width: int) -> torch.Tensor:
    gate, up = gate_up_NF.float().chunk(2, dim=-1)
    return functional.pad(functional.silu(gate) * up, (0, width - gate.shape[1])).to(gate_up_NF.dtype)


def gated_silu_backward(
    gate_up_NF: torch.Tensor, gradient_NK: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    leaf_NF = gate_up_NF.float().requires_grad_()
    hidden_NF = gated_silu(leaf_NF, gate_up_NF.shape[1] // 2)
    (out_NF,) = torch.autograd.grad(hidden_NF, leaf_NF, gradient_NK[:, : hidden_NF.shape[1]].float())
    return out_NF.to(gate_up_NF.dtype), hidden_NF.detach().to(gate_up_NF.dtype)


def split_heads(
    qkv_NE: torch.Tensor,
    cosine_TC: torch.Tensor,
    sine_TC: torch.Tensor,
    *,
    scale: float,
    num_kv_heads: int,
    start: int,
) -> tuple[torch.Tensor, ...]:
    num_tokens, half = cosine_TC.shape
    heads = qkv_NE.float().view(-1, num_tokens, qkv_NE.shape[1] // (2 * half), 2 * half).transpose(1, 2)
    first, second = heads[:, :-num_kv_heads].chunk(2, dim=-1)
    crossed = (first * cosine_TC - second * sine_TC, second * cosine_TC + first * sine_TC)
    turned = torch.cat(crossed, dim=-1)
    parts = (turned[:, :-num_kv_heads] * scale, turned[:, -num_kv_heads:], heads[:, -num_kv_heads:])
    num_pairs = len(heads) * num_kv_heads
    query, *others = (part.reshape(num_pairs, -1, 2 * half).to(qkv_NE.dtype) for part in parts)
    return query, *(functional.pad(one, (0, 0, start, 0)) for one in others)


def split_heads_backward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cosine_TC: torch.Tensor,
    sine_TC: torch.Tensor,
    *,
    out_NE: torch.Tensor,
    **sizes: int,
) -> None:
    leaf_NE = torch.zeros_like(out_NE, dtype=torch.float32).requires_grad_()
    made = split_heads(leaf_NE, cosine_TC, sine_TC, **sizes)
    (gradient_NE,) = torch.autograd.grad(made, leaf_NE, [one.float() for one in (query, key, value)])
    out_NE.copy_(gradient_NE)


def causal_softmax_(scores_PQS: torch.Tensor, num_tokens: int, start: int) -> torch.Tensor:
    num_queries, num_keys = scores_PQS.shape[1:]
    seen_Q1 = torch.arange(num_queries)[:, None] % num_tokens + start
    scores_PQS.masked_fill_(torch.arange(num_keys) > seen_Q1, float("-inf"))
    return scores_PQS.copy_(torch.softmax(scores_PQS, dim=-1, dtype=torch.float32))


def causal_softmax_backward_(
    gradient_PQS: torch.Tensor, weights_PQS: torch.Tensor, num_tokens: int, start: int
) -> torch.Tensor:
    del num_tokens, start
    gradient, weights = gradient_PQS.float(), weights_PQS.float()
    return gradient_PQS.copy_((gradient - (gradient * weights).sum(dim=-1, keepdim=True)) * weights)
