"""All kernels as compiled loops for a CPU."""

from luthier.modeling.kernels._attend_pages import attend_pages
from luthier.modeling.kernels._choosing import draw, find_best
from luthier.modeling.kernels._heads import (
    merge_heads,
    merge_heads_backward,
    split_heads,
    split_heads_backward,
)
from luthier.modeling.kernels._pair_attention import attend_pairs, attend_pairs_backward
from luthier.modeling.kernels._panel_products import panel_product
from luthier.modeling.kernels._panel_updates import panel_low_rank, panel_update_gradients
from luthier.modeling.kernels._products import tile_product
from luthier.modeling.kernels._program import run_program
from luthier.modeling.kernels._rows import (
    causal_softmax,
    causal_softmax_backward,
    gated_silu,
    gated_silu_backward,
    rms_norm,
    rms_norm_backward,
    softmax_loss,
)
from luthier.modeling.kernels._serving import add_bottleneck, add_low_rank, add_rms_norm
from luthier.modeling.kernels._stretch_attention import attend_stretches
from luthier.modeling.kernels._stretches import add_low_rank_stretches

__all__ = [
    "add_bottleneck",
    "add_low_rank",
    "add_low_rank_stretches",
    "add_rms_norm",
    "attend_pages",
    "attend_pairs",
    "attend_pairs_backward",
    "attend_stretches",
    "causal_softmax",
    "causal_softmax_backward",
    "draw",
    "find_best",
    "gated_silu",
    "gated_silu_backward",
    "merge_heads",
    "merge_heads_backward",
    "panel_low_rank",
    "panel_product",
    "panel_update_gradients",
    "rms_norm",
    "rms_norm_backward",
    "run_program",
    "softmax_loss",
    "split_heads",
    "split_heads_backward",
    "tile_product",
]
