"""Linear layers of a model on a CPU, with weights in oneDNN's blocked layout: a product of few rows is 2 to 4
times as fast, and the row-major weights are freed."""

from functools import partial

import torch
from torch import nn

# Rows that the layout is chosen for.
_NUM_ROWS = 16


def block_weights(model: nn.Module) -> None:
    """Block the weights of a model's linear layers, where the processor has kernels for their type."""
    parameter = next(model.parameters())
    if parameter.device.type != "cpu" or not _has_kernels(parameter.dtype):
        return
    for module in model.modules():
        if type(module) is nn.Linear and type(module.weight) is nn.Parameter and module.weight.dim() == 2:
            blocked = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach(), _NUM_ROWS)
            # Whatever else reads the weight raises.
            module.weight = nn.Parameter(blocked, requires_grad=False)
            module.forward = partial(_multiply, module)


def row_major(weight: torch.Tensor) -> torch.Tensor:
    """Return a weight, blocked or not, in rows."""
    return weight.to_dense() if weight.is_mkldnn else weight


def _multiply(module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, module.weight, module.bias, "none", [], "")
    return product


def _has_kernels(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype is torch.float32
