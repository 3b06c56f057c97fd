"""The rows of the table: what we train, beside which peer, in which variants, and how far ahead we must be.

The bars are those of the project's goals. A peer's variants are tried once each; the fastest with the same
loss is the one that we run pairs with.
"""

from dataclasses import dataclass, field
from typing import Any

# One step's rows, and all the rows of a measurement.
BATCH_SIZE = 8
NUM_ROWS = 48
NUM_PAIRS = 5
SEED = 1

LORA: dict[str, Any] = {"type": "lora", "rank": 16, "alpha": 32, "target_modules": "all-linear"}
ADAPTER: dict[str, Any] = {"type": "adapter", "bottleneck_dim": 64, "placement": "houlsby"}


@dataclass(frozen=True)
class Variant:
    """One way to run a peer.

    `options` go to its script. `has_our_order`: its steps see the same rows as ours, so losses compare step
    by step. `has_our_loss`: it optimises the same objective. `has_our_precision`: what is trained, and the
    optimizer's sums over it, have float32's precision, as ours have. Variants that lack either are shown and
    never chosen. `devices`: where it is worth a try, for ten minutes on a GPU are short.
    """

    name: str
    options: dict[str, Any]
    has_our_order: bool = True
    has_our_loss: bool = True
    has_our_precision: bool = True
    devices: tuple[str, ...] = ("cpu", "cuda")


@dataclass(frozen=True)
class Row:
    """One row: `script` runs in the environment `environment` of .venv-peers.

    `bar` is how many times the peer's tokens a second ours must be, `memory_bar` the most that our memory may
    be of the peer's.
    """

    name: str
    title: str
    tuning: dict[str, Any]
    environment: str
    script: str
    variants: list[Variant]
    bar: float
    memory_bar: float | None = 0.6
    devices: tuple[str, ...] = field(default=("cpu", "cuda"))


def _bf16_variants(**extra: Any) -> list[Variant]:
    """The ways to have bf16 with Trainer: weights at rest, or cast at every use, or all of it."""
    ours = {"order": "ours", **extra}
    return [
        Variant("bf16 weights", {**ours, "weights": "bfloat16"}, devices=("cpu",)),
        Variant(
            "bf16 weights and adapters",
            {**ours, "weights": "bfloat16", "pure": True},
            has_our_precision=False,
        ),
        Variant("bf16 weights, autocast", {**ours, "weights": "bfloat16", "autocast": True}),
        Variant("fp32 weights, autocast", {**ours, "weights": "float32", "autocast": True}, devices=("cpu",)),
    ]


def _trl_variants() -> list[Variant]:
    both = {"weights": "bfloat16", "pure": True}
    return [
        *_bf16_variants(),
        Variant("packing", {"packing": True, **both}, has_our_order=False, has_our_precision=False),
        Variant(
            "packing, autocast",
            {"packing": True, "weights": "bfloat16", "autocast": True},
            has_our_order=False,
            devices=("cpu",),
        ),
        Variant(
            "dft loss",
            {"order": "ours", "loss": "dft", **both},
            has_our_loss=False,
            has_our_precision=False,
            devices=("cpu",),
        ),
    ]


def _llama_factory_variants() -> list[Variant]:
    autocast = {"order": "ours", "weights": "bfloat16", "autocast": True}
    return [
        Variant("bf16", autocast),
        Variant("neat packing", {**autocast, "packing": True}, has_our_order=False),
    ]


def _full_variants() -> list[Variant]:
    ours = {"order": "ours"}
    return [
        Variant("fp32 weights, autocast", {**ours, "weights": "float32", "autocast": True}),
        # Without float32 masters: a step smaller than a bf16 rounding is lost.
        Variant("bf16 weights", {**ours, "weights": "bfloat16"}, has_our_precision=False),
        Variant(
            "bf16 weights, autocast",
            {**ours, "weights": "bfloat16", "autocast": True},
            has_our_precision=False,
        ),
    ]


ROWS: dict[str, Row] = {
    row.name: row
    for row in [
        Row("lora-trl", "LoRA beside TRL", LORA, "trl", "trl_sft", _trl_variants(), 3.0),
        Row(
            "lora-llamafactory",
            "LoRA beside LLaMA-Factory",
            LORA,
            "llamafactory",
            "llama_factory",
            _llama_factory_variants(),
            3.0,
            devices=("cpu",),
        ),
        Row(
            "lora-trainer",
            "LoRA beside Trainer+PEFT as it comes",
            LORA,
            "trl",
            "trainer_peft",
            [Variant("defaults: fp32, random order", {"defaults": True}, has_our_order=False)],
            5.0,
        ),
        Row(
            "prefix-trainer",
            "prefix beside Trainer+PEFT",
            {"type": "prefix", "num_virtual_tokens": 20, "init": "random", "projection": False},
            "trl",
            "trainer_peft",
            _bf16_variants(),
            2.0,
        ),
        Row(
            "prompt-trainer",
            "prompt beside Trainer+PEFT",
            {"type": "prompt", "num_virtual_tokens": 20, "init": "random"},
            "trl",
            "trainer_peft",
            _bf16_variants(),
            2.0,
        ),
        Row(
            "adapter-adapters",
            "adapter beside `adapters`",
            ADAPTER,
            "adapters",
            "adapters_library",
            _bf16_variants(),
            2.0,
        ),
        Row(
            "full-trainer",
            "full beside Trainer",
            {"type": "full"},
            "trl",
            "trainer_peft",
            _full_variants(),
            2.0,
            memory_bar=0.9,
        ),
        Row(
            "lora-unsloth",
            "LoRA beside Unsloth",
            LORA,
            "unsloth",
            "unsloth_sft",
            [Variant("bf16", {"order": "ours", "weights": "bfloat16"})],
            1.0,
            memory_bar=None,
            devices=("cuda",),
        ),
    ]
}

# Rows of another kind, each with a file of its own.
SHORT_JOB, GROWTH = "short-job", "growth"
SHORT_JOB_BAR, SHORT_JOB_ROWS = 3.0, 200
