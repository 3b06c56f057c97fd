"""All kernels as compiled loops for a CPU."""

from luthier_cpu.codegen.kernel_graph import run_program
from luthier_cpu.decode.kernels.paged_attention import attend_pages
from luthier_cpu.decode.kernels.prefill_attention import attend_stretches
from luthier_cpu.decode.kernels.prefill_lora import add_low_rank_stretches
from luthier_cpu.decode.kernels.sampling_kernels import draw, find_best
from luthier_cpu.decode.kernels.step_kernels import add_bottleneck, add_low_rank, add_rms_norm
from luthier_cpu.gemm.panel_kernels import panel_product
from luthier_cpu.gemm.panel_updates import panel_low_rank, panel_update_gradients
from luthier_cpu.gemm.product_kernels import tile_product
from luthier_cpu.training.elementwise_kernels import (
    causal_softmax,
    causal_softmax_backward,
    gated_silu,
    gated_silu_backward,
    rms_norm,
    rms_norm_backward,
    softmax_loss,
)
from luthier_cpu.training.head_kernels import (
    merge_heads,
    merge_heads_backward,
    split_heads,
    split_heads_backward,
)
from luthier_cpu.training.pair_attention_kernels import attend_pairs, attend_pairs_backward

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
