"""Drop-in folder: one way to tune a model per file. Files that begin with `_`, and base.py, are skipped.

The API imports this, so no file here imports torch, transformers or peft at its top.
"""

from luthier.methods._discover import discover, method_of_artifact
from luthier.methods._tuning import (
    MAX_BATCH_SIZE,
    MAX_BETA,
    MAX_EPOCHS,
    check_tuning,
    inherit_tuning,
    parse_tuning,
    resolve_spec,
    room_in_context,
    row_limit,
)
from luthier.methods.base import (
    Attached,
    BottleneckPart,
    Installed,
    LowRankPart,
    Method,
    MethodParams,
    ServedParts,
    Start,
    Workload,
)

__all__ = [
    "MAX_BATCH_SIZE",
    "MAX_BETA",
    "MAX_EPOCHS",
    "Attached",
    "BottleneckPart",
    "Installed",
    "LowRankPart",
    "Method",
    "MethodParams",
    "ServedParts",
    "Start",
    "Workload",
    "check_tuning",
    "discover",
    "inherit_tuning",
    "method_of_artifact",
    "parse_tuning",
    "resolve_spec",
    "room_in_context",
    "row_limit",
]
