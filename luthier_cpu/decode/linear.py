"""Linear layers without bias whose weights are stored as the processor's matrix products read them.

Our own products over tiles (gemm/products.py) come first, where the processor has them. oneDNN's layout is
next: it is read several times faster in bfloat16 than the plain one, for one row above all. Its operators
are private to torch, so they are named here alone, tried once a process, and where they are missing or wrong
the plain product runs.

Legend: N rows, K inputs, O outputs.
"""

import logging
from functools import cache

import torch
from torch.nn import functional

from luthier_cpu.gemm.panel_products import come_out_right, largest_difference
from luthier_cpu.gemm.products import TiledWeight, can_tile

_LOG = logging.getLogger(__name__)


class PackedLinear:
    """`x W'` with a weight in tiles, else packed, where that is known to work.

    Args:
        weight_OK: float32 or bfloat16; copied, so that it may be let go of.
        memory: for a weight in tiles, `tiled_bytes` of it; memory of its own when left out.
    """

    def __init__(self, weight_OK: torch.Tensor, memory: torch.Tensor | None = None) -> None:
        self.num_outputs, self.num_inputs = weight_OK.shape
        self.tiled = TiledWeight(weight_OK, memory) if can_tile(weight_OK) else None
        is_packed = self.tiled is None and can_pack(weight_OK.dtype)
        self._packed = _pack(weight_OK) if is_packed else None
        self._weight = weight_OK.clone() if self._packed is None and self.tiled is None else None

    def __call__(
        self, x_NK: torch.Tensor, out_NO: torch.Tensor | None = None, following: tuple[int, int] = (0, 0)
    ) -> torch.Tensor:
        """Return the product in x's type: `out_NO` where it was written there, else a new tensor.

        `following` is as `TiledWeight.times` takes it.
        """
        if self.tiled is not None:
            if out_NO is None:
                out_NO = x_NK.new_empty(len(x_NK), self.num_outputs)
            return self.tiled.times(x_NK, out_NO, following)
        if self._packed is not None:
            return _product(x_NK, self._packed)
        assert self._weight is not None
        return functional.linear(x_NK, self._weight)


@cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether packed products are here and give the plain ones' results, by trying; the log says if not."""
    if dtype not in {torch.float32, torch.bfloat16} or not torch.backends.mkldnn.is_available():
        return False
    generator = torch.Generator().manual_seed(0)
    weight_OK = torch.randn(48, 80, generator=generator).to(dtype)

    def gap(num_rows: int) -> float:
        x_NK = torch.randn(num_rows, 80, generator=generator).to(dtype)
        expected_NO = functional.linear(x_NK.float(), weight_OK.float())
        return largest_difference([_product(x_NK, packed)], [expected_NO])

    try:
        packed = _pack(weight_OK)
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        return come_out_right(f"Packed {dtype} products", map(gap, (1, 5, 40)), largest=tolerance)
    # What a private operator that is missing, or takes other arguments, ends with.
    except (AttributeError, RuntimeError, TypeError) as error:
        _LOG.warning("There are no packed %s products (%s); plain ones run, slower.", dtype, error)
        return False


def _pack(weight_OK: torch.Tensor) -> torch.Tensor:
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_OK.contiguous())
    return packed


def _product(x_NK: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    out_NO: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x_NK, packed, None, "none", [], "")
    return out_NO
