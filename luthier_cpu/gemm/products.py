"""Products with weights in tiles, on processors with products of pairs of bfloat16 (AVX-512 BF16).

Read at the speed of memory, which a decode step's products take as long as.

Legend: N rows, K inputs, O outputs.
"""

from functools import cache

import torch
from torch.nn import functional

from luthier_cpu.codegen import kernels
from luthier_cpu.codegen.openmp import Launcher
from luthier_cpu.codegen.page_memory import LINE, take_large
from luthier_cpu.gemm.panel_products import come_out_right
from luthier_cpu.gemm.tile_shapes import PANEL_OUTPUTS, TILE_INPUTS


class TiledWeight:
    """A weight in tiles (gemm/tile_shapes.py), its outputs filled up with zeros to a multiple of 64.

    Args:
        weight_OK: bfloat16, K a multiple of 32; copied.
        memory: where it is stored, as many bytes as `tiled_bytes` says; its own when left out.

    Raises:
        RuntimeError: where there are no such products, by `has_tiles`.
        ValueError: when the memory is of another size, or does not begin at a multiple of 64.
    """

    def __init__(self, weight_OK: torch.Tensor, memory: torch.Tensor | None = None) -> None:
        if not kernels.has_pairs():
            raise RuntimeError("This processor has no products of bfloat16 pairs.")
        self.num_outputs, self.num_inputs = weight_OK.shape
        if memory is None:
            memory = take_large(tiled_bytes(weight_OK))
        if memory.data_ptr() % LINE:
            raise ValueError(f"Memory for a weight in tiles begins at a multiple of {LINE} bytes.")
        self._memory = memory
        missing = -self.num_outputs % PANEL_OUTPUTS
        filled = functional.pad(weight_OK, (0, 0, 0, missing)) if missing else weight_OK
        parts = filled.view(-1, 4, 16, self.num_inputs // TILE_INPUTS, 16, 2).permute(0, 3, 1, 4, 2, 5)
        memory.view(torch.bfloat16).view(parts.shape).copy_(parts)
        self._launcher = Launcher(kernels.compiled_address("tile_product", torch.bfloat16))

    def times(
        self, x_NK: torch.Tensor, out_NO: torch.Tensor, following: tuple[int, int] = (0, 0)
    ) -> torch.Tensor:
        """Write `x W'` into out.

        Args:
            out_NO: where the product goes.
            following: what is asked for meanwhile (batch_layout.py): the address of the N rows' adapters, 0
                for none, and the entry of a region in their tables.

        Raises:
            ValueError: unless both are bfloat16, contiguous and of the product's shape.
        """
        is_like = x_NK.dtype == out_NO.dtype == torch.bfloat16 and len(x_NK) == len(out_NO)
        has_shape = x_NK.shape[1] == self.num_inputs and out_NO.shape[1] == self.num_outputs
        if not (is_like and has_shape and x_NK.is_contiguous() and out_NO.is_contiguous()):
            raise ValueError("A product in tiles takes contiguous bfloat16 rows of the weight's shape.")
        addresses = (x_NK.data_ptr(), self._memory.data_ptr(), out_NO.data_ptr())
        self._launcher.run((len(x_NK), self.num_inputs, self.num_outputs, *addresses, *following))
        return out_NO


def tiled_bytes(weight_OK: torch.Tensor) -> int:
    """Return the memory of a weight in tiles."""
    num_outputs, num_inputs = weight_OK.shape
    return -(-num_outputs // PANEL_OUTPUTS) * PANEL_OUTPUTS * num_inputs * 2


def can_tile(weight_OK: torch.Tensor) -> bool:
    """Whether a weight can be stored so here."""
    return weight_OK.dtype == torch.bfloat16 and weight_OK.shape[1] % TILE_INPUTS == 0 and has_tiles()


@cache
def has_tiles() -> bool:
    """Whether products in this layout run here: the processor has them, and some come out right."""
    return kernels.has_pairs() and come_out_right(
        "Products of pairs", map(_largest_gap, (1, 3, 7, 8, 13, 21, 40)), largest=2**-8
    )


def _largest_gap(num_rows: int) -> float:
    """Return by how much a product of random numbers is off, as a share of what its parts come to."""
    generator = torch.Generator().manual_seed(num_rows)
    weight_OK = torch.randn(80, 5 * TILE_INPUTS, generator=generator).bfloat16()
    x_NK = torch.randn(num_rows, 5 * TILE_INPUTS, generator=generator).bfloat16()
    expected_NO = functional.linear(x_NK.float(), weight_OK.float())
    parts_NO = functional.linear(x_NK.float().abs(), weight_OK.float().abs())
    found_NO = TiledWeight(weight_OK).times(x_NK, x_NK.new_empty(num_rows, 80)).float()
    return float(((found_NO - expected_NO).abs() / parts_NO).max())
