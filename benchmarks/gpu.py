"""The same rows on CUDA, beside Unsloth, TRL and Trainer where they install: `make bench-gpu`, 10 minutes.

It has not run yet: until benchmarks/results/gpu.json is there, every claim of speed says "CPU".
"""

import contextlib
import signal
import sys
from pathlib import Path
from types import FrameType

from benchmarks.results_file import ROOT
from benchmarks.train.__main__ import parse_options, run_bench, runs_on
from benchmarks.train.contestants import PeerFailedError, ensure_environment
from benchmarks.train.rows import ROWS

RESULTS: Path = ROOT / "benchmarks" / "results" / "gpu.json"
MAX_SECONDS = 600
# Most telling first, should the time run out.
_ORDER = ["lora-unsloth", "lora-trl", "lora-trainer", "full-trainer", "adapter-adapters", "prefix-trainer"]


class TimeUpError(Exception):
    """The ten minutes are over; what was measured is stored."""


def main() -> None:
    """Measure on the device, or say in one line that there is none."""
    import torch

    if not torch.cuda.is_available():
        sys.exit("bench-gpu: no CUDA device here; nothing was measured.")
    names = [*_ORDER, *(name for name in ROWS if name not in _ORDER and runs_on(name, "cuda"))]
    options = parse_options(names, prog="python -m benchmarks.gpu", results=RESULTS)
    for environment in sorted({ROWS[name].environment for name in options.only or names}):
        # Installed before the clock runs; one that can't be is told in its row.
        with contextlib.suppress(PeerFailedError):
            ensure_environment(environment)
    signal.signal(signal.SIGALRM, _time_up)
    signal.alarm(MAX_SECONDS)
    try:
        run_bench(options, "cuda", options.only or names)
    except TimeUpError:
        sys.exit(
            f"bench-gpu: ten minutes are over; {options.out} holds what was measured. Run it again to go on."
        )


def _time_up(_number: int, _frame: FrameType | None) -> None:
    raise TimeUpError


if __name__ == "__main__":
    main()
