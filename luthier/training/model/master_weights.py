"""Where the float32 masters of bf16 weights begin: at what the base's files hold, which bf16 has rounded."""

from pathlib import Path

import torch

from luthier.methods import Attached
from luthier.modeling.load import iterate_weights
from luthier.training.model.split_adamw import SplitAdamW


def start_masters(optimizer: torch.optim.Optimizer, attached: Attached, folder: Path) -> int:
    """Let the masters of trained base weights be the base's own numbers.

    A file whose numbers are bf16 or of less precision has nothing to give; a weight that the library has
    renamed or put together from several is left as it is.

    Args:
        optimizer: before its first step; one without masters is left as it is.

    Returns:
        How many weights have such masters.
    """
    if not isinstance(optimizer, SplitAdamW):
        return 0
    trained = {
        name: weight
        for name, weight in attached.causal_lm.named_parameters(remove_duplicate=False)
        if weight.requires_grad and weight.dtype == torch.bfloat16
    }
    if not trained:
        return 0
    return sum(
        optimizer.set_master(trained[name], numbers)
        for name, numbers in iterate_weights(folder)
        if name in trained and numbers.dtype in (torch.float32, torch.float64)
    )
