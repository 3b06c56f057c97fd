"""The likeliest token of each row of logits.

Legend: R rows, V vocabulary.
"""

import torch

from luthier.modeling import kernels
from luthier.modeling.kernels._threads import launch

# Stands for the token of a row whose largest logit is not finite, or that has one that is no number.
UNSOUND = -1


def find_best(logits_RV: torch.Tensor, out_R: torch.Tensor) -> torch.Tensor:
    """Write the likeliest token of each row, of equals the first, and `UNSOUND` where there is none.

    Args:
        logits_RV: of any float type, contiguous.
        out_R: int64, contiguous, on the same device.

    Returns:
        out_R.

    Raises:
        ValueError: when the result does not fit.
    """
    num_rows, size = logits_RV.shape
    is_like = out_R.shape == (num_rows,) and out_R.dtype == torch.int64
    if not (is_like and logits_RV.is_contiguous() and out_R.is_contiguous()):
        raise ValueError("The likeliest tokens are int64, one a row of whole contiguous logits.")
    if kernels.is_compiled(logits_RV) and out_R.device == logits_RV.device:
        address = kernels.compiled_address("find_best", logits_RV.dtype)
        launch(address, (num_rows, size, logits_RV.data_ptr(), out_R.data_ptr()))
        return out_R
    largest_R, ids_R = logits_RV.max(dim=-1)
    # A NaN anywhere in a row is its maximum.
    return out_R.copy_(ids_R.masked_fill(~torch.isfinite(largest_R), UNSOUND))
