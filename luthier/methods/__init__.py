"""Drop-in folder: one way to tune a model per file. Files that begin with `_`, and base.py, are skipped.

The API imports this, so no file here imports torch, transformers or peft at its top.
"""

from luthier.methods.base import (
    Attached,
    BottleneckPart,
    LowRankPart,
    Method,
    MethodParams,
    ServedParts,
    Start,
    Workload,
    discover,
    method_of_artifact,
)

__all__ = [
    "Attached",
    "BottleneckPart",
    "LowRankPart",
    "Method",
    "MethodParams",
    "ServedParts",
    "Start",
    "Workload",
    "discover",
    "method_of_artifact",
]
