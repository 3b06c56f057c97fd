"""Linear layers without bias whose weights lie as the processor's matrix products want them.

oneDNN reads such a layout at the speed of memory even for one row, where the plain one is several times
slower in bfloat16. The operators are private to torch, so they are named here alone, tried once a process,
and where they are missing or wrong the plain product runs.

Legend: N rows, K inputs, O outputs.
"""

import logging
from functools import cache

import torch
from torch.nn import functional

_LOG = logging.getLogger(__name__)


class PackedLinear:
    """`x W'` with a weight that is packed where that is known to work.

    Args:
        weight_OK: float32 or bfloat16; copied, so that it may be let go of.
    """

    def __init__(self, weight_OK: torch.Tensor) -> None:
        self.num_outputs, self.num_inputs = weight_OK.shape
        self.is_packed = weight_OK.device.type == "cpu" and can_pack(weight_OK.dtype)
        self._weight = _pack(weight_OK) if self.is_packed else weight_OK.clone()

    def __call__(self, x_NK: torch.Tensor) -> torch.Tensor:
        """Return out_NO in x's type."""
        if self.is_packed:
            return _product(x_NK, self._weight)
        return functional.linear(x_NK, self._weight)


@cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether packed products are here and give the plain ones' results, by trying; the log says if not."""
    if dtype not in {torch.float32, torch.bfloat16} or not torch.backends.mkldnn.is_available():
        return False
    generator = torch.Generator().manual_seed(0)
    weight_OK = torch.randn(48, 80, generator=generator).to(dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    try:
        packed = _pack(weight_OK)
        for num_rows in (1, 5, 40):
            x_NK = torch.randn(num_rows, 80, generator=generator).to(dtype)
            expected_NO = functional.linear(x_NK.float(), weight_OK.float())
            gap = (_product(x_NK, packed).float() - expected_NO).abs().max() / expected_NO.abs().max()
            if not float(gap) <= tolerance:
                _LOG.warning("Packed %s products are off by %.2g; plain ones run, slower.", dtype, float(gap))
                return False
    # What a private operator that is missing, or takes other arguments, ends with.
    except (AttributeError, RuntimeError, TypeError) as error:
        _LOG.warning("There are no packed %s products (%s); plain ones run, slower.", dtype, error)
        return False
    return True


def _pack(weight_OK: torch.Tensor) -> torch.Tensor:
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_OK.contiguous())
    return packed


def _product(x_NK: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    out_NO: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x_NK, packed, None, "none", [], "")
    return out_NO
