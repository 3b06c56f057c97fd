"""Where a training step's time goes: `python -m benchmarks.profile [--method lora] [--rows 48]`.

Trains the benchmark's rows in this process with torch's profiler on, and prints the operators by their own
time beside the bound: the same step if every product ran at this machine's measured peak and nothing else
cost time. Own time of a fused layer (NormLinear, Attention, …) is that of its compiled kernels.
"""

import argparse
import bisect
import os
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.machine import gemm_peaks, read_shape, step_flops
from benchmarks.results_file import ROOT
from benchmarks.train.ours import write_run_directory
from benchmarks.train.rows import ADAPTER, BATCH_SIZE, LORA, ROWS, SEED
from benchmarks.train.workload import find_base, load_rows, make_spec, make_workload

TUNINGS: dict[str, dict[str, Any]] = {
    "lora": LORA,
    "adapter": ADAPTER,
    "prefix": ROWS["prefix-trainer"].tuning,
    "prompt": ROWS["prompt-trainer"].tuning,
    "full": ROWS["full-trainer"].tuning,
}
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
_NUM_SHOWN = 25
_GRADIENTS, _UPDATE = "gradients of a step", "update of a step"


def main() -> None:
    """Profile the steps of one short run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile", description=__doc__)
    parser.add_argument("--method", choices=list(TUNINGS), default="lora")
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--data", type=Path, default=ROOT / "examples" / "support" / "train.jsonl")
    parser.add_argument("--by-shape", action="store_true", help="products by the shapes of their inputs")
    options = parser.parse_args()
    # Before torch is imported, as the training process has it.
    os.environ["HF_HUB_OFFLINE"] = "1"
    facts, folder = find_base()
    num_threads = os.cpu_count() or 1
    with tempfile.TemporaryDirectory(prefix="luthier-profile-") as name:
        scratch = Path(name)
        workload = make_workload(
            load_rows(options.data, folder, num_rows=options.rows, batch_size=BATCH_SIZE),
            facts,
            folder,
            batch_size=BATCH_SIZE,
            seed=SEED,
            num_threads=num_threads,
            device="cpu",
            scratch=scratch,
        )
        spec = make_spec(workload, TUNINGS[options.method])
        write_run_directory(scratch / "run", workload, spec)
        times = profile_steps(scratch / "run", by_shape=options.by_shape)
    shape, step_tokens = read_shape(folder), workload.rows.num_tokens // workload.num_steps
    peak = gemm_peaks(shape, step_tokens, num_threads)["bfloat16"]
    flops = step_flops(
        shape,
        spec.tuning,
        num_tokens=workload.num_computed_tokens,
        num_supervised=workload.num_supervised_tokens,
        # Virtual tokens run once a part, and a step is one.
        num_rows=workload.num_steps,
    )
    print(f"{workload.rows.num_tokens:,} tokens of the rows, {workload.num_computed_tokens:,} of them run")
    report(times, num_steps=workload.num_steps, least_seconds=flops / peak / 1e9, peak=peak)


def profile_steps(folder: Path, *, by_shape: bool) -> dict[str, tuple[float, int]]:
    """Train a run directory in this process.

    Args:
        folder: the run directory.
        by_shape: name products with the shapes of their inputs.

    Returns:
        Own seconds and calls of every operator within the steps, and the whole seconds of the two halves of a
        step under the names that they have here. The first step, which warms up, is left out.
    """
    from torch.profiler import ProfilerActivity, profile, record_function

    from luthier.training.loop import loop
    from luthier.training.loop.gradient_accumulation import GradientAccumulator
    from luthier.training.process_io import StopRequest
    from luthier.training.run import run

    def named(name: str, function: Any) -> Any:
        def call(*args: Any, **named_args: Any) -> Any:
            with record_function(name):
                return function(*args, **named_args)

        return call

    compute, apply = GradientAccumulator.compute, loop.apply_gradients
    with (
        mock.patch.object(GradientAccumulator, "compute", named(_GRADIENTS, compute)),
        mock.patch.object(loop, "apply_gradients", named(_UPDATE, apply)),
        (folder / "events").open("wb") as events,
        profile(activities=[ProfilerActivity.CPU], record_shapes=by_shape) as profiler,
    ):
        if not run(folder, events.fileno(), StopRequest()):
            raise SystemExit((folder / "events").read_text()[-2000:])
    found = list(profiler.events())
    spans = sorted(
        (one.time_range.start, one.time_range.end) for one in found if one.name in (_GRADIENTS, _UPDATE)
    )[2:]
    starts = [start for start, _ in spans]
    times: dict[str, tuple[float, int]] = defaultdict(lambda: (0.0, 0))
    for one in found:
        place = bisect.bisect_right(starts, one.time_range.start) - 1
        if place < 0 or one.time_range.end > spans[place][1]:
            continue
        is_half = one.name in (_GRADIENTS, _UPDATE)
        name = f"{one.name} {one.input_shapes[:3]}" if by_shape and one.name in _PRODUCTS else one.name
        seconds, calls = times[name]
        microseconds = one.cpu_time_total if is_half else one.self_cpu_time_total
        times[name] = (seconds + microseconds / 1e6, calls + 1)
    return dict(times)


def report(times: dict[str, tuple[float, int]], *, num_steps: int, least_seconds: float, peak: float) -> None:
    """Print operators by their own time, and the bounds."""
    halves = {name: times.pop(name)[0] for name in (_GRADIENTS, _UPDATE)}
    measured_steps = num_steps - 1
    whole = sum(halves.values())
    products = sum(seconds for name, (seconds, _) in times.items() if name.split(" ")[0] in _PRODUCTS)
    print(f"A step: {1e3 * whole / measured_steps:,.0f} ms, with torch's profiler on")
    for name, seconds in halves.items():
        print(f"  {name}: {1e3 * seconds / measured_steps:,.0f} ms")
    share = 100 * products / whole
    print(f"  in torch's matrix products: {1e3 * products / measured_steps:,.0f} ms ({share:.0f} %)")
    print(
        f"  the products of the tokens that run, at the measured peak of {peak:.0f} GFLOP/s: "
        f"{1e3 * least_seconds / num_steps:,.0f} ms"
    )
    print("\n| operator | own ms a step | share | calls a step |\n|---|---|---|---|")
    for name, (seconds, calls) in sorted(times.items(), key=lambda item: -item[1][0])[:_NUM_SHOWN]:
        milliseconds = 1e3 * seconds / measured_steps
        share = 100 * seconds / whole
        print(f"| {name} | {milliseconds:,.1f} | {share:.1f} % | {calls / measured_steps:,.0f} |")


if __name__ == "__main__":
    main()
