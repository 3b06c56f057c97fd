"""The kernels in torch's own operators: any device, any type. What each does is told in __init__.py."""

import torch
from torch.nn import functional


def rms_norm(
    x_ND: torch.Tensor, weight_D: torch.Tensor, epsilon: float, out_NK: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write weight * x / rms(x) into the first columns of out; return it and 1 / rms(x)."""
    wide_ND = x_ND.float()
    inverse_N1 = torch.rsqrt(wide_ND.pow(2).mean(-1, keepdim=True) + epsilon)
    out_NK[:, : x_ND.shape[1]] = weight_D * (wide_ND * inverse_N1).to(x_ND.dtype)
    return out_NK, inverse_N1[:, 0]


def rms_norm_backward(
    gradient_NK: torch.Tensor, x_ND: torch.Tensor, weight_D: torch.Tensor, inverse_N: torch.Tensor
) -> torch.Tensor:
    """Return the gradient of x."""
    scaled_ND = gradient_NK[:, : x_ND.shape[1]].float() * weight_D.float()
    unit_ND = x_ND.float() * inverse_N[:, None]
    shared_N1 = (scaled_ND * unit_ND).mean(-1, keepdim=True)
    return ((scaled_ND - unit_ND * shared_N1) * inverse_N[:, None]).to(x_ND.dtype)


def gated_silu(gate_up_NF: torch.Tensor, out_NK: torch.Tensor, size: int) -> None:
    """Write silu(gate) * up into the first columns of out."""
    gate, up = gate_up_NF.float().chunk(2, dim=-1)
    out_NK[:, :size] = (functional.silu(gate) * up).to(out_NK.dtype)


def gated_silu_backward(
    gate_up_NF: torch.Tensor,
    gradient_NK: torch.Tensor,
    out_NF: torch.Tensor,
    hidden_NF: torch.Tensor,
    size: int,
) -> None:
    """Write the gradients of gate and up, and silu(gate) * up once more."""
    gate, up = gate_up_NF.float().chunk(2, dim=-1)
    gradient = gradient_NK[:, :size].float()
    share = torch.sigmoid(gate)
    activated = gate * share
    out_NF[:, :size] = (gradient * up * (share + activated * (1 - share))).to(out_NF.dtype)
    out_NF[:, size:] = (gradient * activated).to(out_NF.dtype)
    hidden_NF.copy_(activated * up)


def split_heads(
    qkv_NE: torch.Tensor,
    cosine_TC: torch.Tensor,
    sine_TC: torch.Tensor,
    scale: float,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    start: int,
) -> None:
    """Write turned queries and keys, and values, one matrix a pair of row and key head."""
    num_tokens, half = cosine_TC.shape
    num_rows = qkv_NE.shape[0] // num_tokens
    num_kv_heads = key.shape[0] // num_rows
    heads = qkv_NE.view(num_rows, num_tokens, -1, 2 * half).transpose(1, 2)
    num_heads = heads.shape[1] - 2 * num_kv_heads
    turned = _turn(heads[:, : num_heads + num_kv_heads].float(), cosine_TC, sine_TC)
    query.copy_((turned[:, :num_heads] * scale).reshape(query.shape))
    key[:, start:] = turned[:, num_heads:].reshape(-1, num_tokens, 2 * half).to(key.dtype)
    value[:, start:] = heads[:, num_heads + num_kv_heads :].reshape(-1, num_tokens, 2 * half)


def split_heads_backward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cosine_TC: torch.Tensor,
    sine_TC: torch.Tensor,
    scale: float,
    out_NE: torch.Tensor,
    start: int,
) -> None:
    """Write the gradient of q, k and v side by side."""
    num_tokens, half = cosine_TC.shape
    num_rows = out_NE.shape[0] // num_tokens
    parts = [
        part.reshape(num_rows, -1, num_tokens, 2 * half).float()
        for part in (query * scale, key[:, start:], value[:, start:])
    ]
    turned = [_turn(part, cosine_TC, -sine_TC) for part in parts[:2]]
    out = torch.cat([*turned, parts[2]], dim=1).transpose(1, 2)
    out_NE.copy_(out.reshape(out_NE.shape))


def merge_heads(attended_PQC: torch.Tensor, out_NK: torch.Tensor, num_tokens: int) -> None:
    """Write the heads' results as rows of tokens."""
    size = attended_PQC.shape[-1]
    num_rows = out_NK.shape[0] // num_tokens
    rows = attended_PQC.reshape(num_rows, -1, num_tokens, size).transpose(1, 2)
    out_NK[:, : rows.shape[2] * size] = rows.reshape(out_NK.shape[0], -1)


def merge_heads_backward(gradient_NK: torch.Tensor, out_PQC: torch.Tensor, num_tokens: int) -> None:
    """Write the gradient of the heads' results."""
    size = out_PQC.shape[-1]
    num_rows = gradient_NK.shape[0] // num_tokens
    num_columns = out_PQC.numel() // gradient_NK.shape[0]
    heads = gradient_NK[:, :num_columns].reshape(num_rows, num_tokens, -1, size).transpose(1, 2)
    out_PQC.copy_(heads.reshape(out_PQC.shape))


def causal_softmax(scores_PQS: torch.Tensor, num_tokens: int, start: int) -> None:
    """Turn scores into weights in place."""
    num_queries, num_keys = scores_PQS.shape[1:]
    seen_Q1 = torch.arange(num_queries, device=scores_PQS.device)[:, None] % num_tokens + start
    is_hidden_QS = torch.arange(num_keys, device=scores_PQS.device)[None] > seen_Q1
    scores_PQS.masked_fill_(is_hidden_QS, float("-inf"))
    scores_PQS.copy_(torch.softmax(scores_PQS, dim=-1, dtype=torch.float32))


def causal_softmax_backward(gradient_PQS: torch.Tensor, weights_PQS: torch.Tensor) -> None:
    """Turn the gradient of the weights into that of the scores, in place."""
    gradient, weights = gradient_PQS.float(), weights_PQS.float()
    total = (gradient * weights).sum(dim=-1, keepdim=True)
    gradient_PQS.copy_((gradient - total) * weights)


def softmax_loss(
    logits_NV: torch.Tensor, targets_N: torch.Tensor, keeps_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return -log p(target) and whether it is the likeliest; turn logits into their gradient in place."""
    targets_N1 = targets_N[:, None]
    is_right_N = logits_NV.argmax(dim=-1) == targets_N
    wide_NV = logits_NV.float()
    normaliser_N1 = torch.logsumexp(wide_NV, dim=-1, keepdim=True)
    nll_N = (normaliser_N1 - wide_NV.gather(1, targets_N1))[:, 0]
    if keeps_gradient:
        if wide_NV is logits_NV:
            wide_NV = logits_NV.clone()
        probabilities_NV = wide_NV.sub_(normaliser_N1).exp_()
        probabilities_NV.scatter_add_(1, targets_N1, torch.full_like(normaliser_N1, -1.0))
        logits_NV.copy_(probabilities_NV)
    return nll_N, is_right_N


def _turn(x: torch.Tensor, cosine_TC: torch.Tensor, sine_TC: torch.Tensor) -> torch.Tensor:
    """Turn the pairs (c, c + C/2) of [rows, heads, T, C] by their angles."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cosine_TC - second * sine_TC, second * cosine_TC + first * sine_TC], dim=-1)
