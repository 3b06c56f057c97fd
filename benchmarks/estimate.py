"""How near estimates come to what is then measured: `python -m benchmarks.estimate`.

For every method: the estimate that the service would give after a calibration, and short real runs of the
training process over the same rows; with `--dpo` over pairs of our preference set (preference_set.py).
Medians of the runs; the bars are 30 % for seconds, 15 % for memory.
Stopped, it goes on from the runs it has.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.preference_set import make_preferences
from benchmarks.results_file import ROOT, ResultsFile, fingerprint_of
from benchmarks.workload import find_base
from luthier.core.estimates import Calibration
from luthier.core.events import FailedEvent, FinishedEvent, parse_event
from luthier.core.settings import Settings
from luthier.core.shapes import read_shape
from luthier.core.specs import (
    BaseFacts,
    DpoOptions,
    Hyperparameters,
    RunInputs,
    TrainingOptions,
    TrainingSpec,
)
from luthier.data.count import count_rows
from luthier.data.prepare import prepare_rows
from luthier.data.prepared import write_prepared
from luthier.methods import check_tuning, discover
from services.calibrations import Measured
from services.estimates import Estimate, estimate
from worker.child import child_environment

RESULTS = ROOT / "benchmarks" / "results" / "estimate.json"
NUM_ROWS = 24
NUM_RUNS = 5
MAX_LENGTH = 1024
SEED = 7
MAX_SECONDS_OFF, MAX_BYTES_OFF = 0.30, 0.15


def main() -> None:
    """Measure what is missing, print the table."""
    options = _parse_options()
    facts, folder = find_base(options.base)
    from benchmarks.machine import describe_machine

    results = ResultsFile(options.out, describe_machine(), fresh=options.fresh)
    with tempfile.TemporaryDirectory(prefix="luthier-bench-") as scratch:
        data = Path(scratch) / "rows.jsonl"
        data.write_bytes(_make_rows(options))
        row = results.row(
            "calibration", fingerprint_of(facts.digest, options.threads, options.precision, _code())
        )
        if "constants" not in row:
            row["constants"] = _calibrate(folder, options)
            results.save()
        for name in options.only or list(discover()):
            _measure(options, results, name, facts, folder, data, Path(scratch))
    print(make_table(results.content["rows"]))
    print(f"{options.out} written")


def _make_rows(options: argparse.Namespace) -> bytes:
    if options.dpo:
        pairs, _ = make_preferences(options.rows, 1)
        return b"".join(json.dumps(row).encode() + b"\n" for row in pairs)
    with options.data.open("rb") as stream:
        return b"".join(line for line, _ in zip(stream, range(options.rows), strict=False))


def _parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.estimate")
    parser.add_argument("--only", action="append", choices=list(discover()), metavar="METHOD")
    parser.add_argument("--runs", type=int, default=NUM_RUNS, help="real runs of a method (%(default)s)")
    parser.add_argument("--rows", type=int, default=NUM_ROWS, help="training rows (%(default)s)")
    parser.add_argument("--data", type=Path, default=ROOT / "examples" / "support" / "train.jsonl")
    parser.add_argument("--dpo", action="store_true", help="train on preferences in place of --data")
    parser.add_argument("--base", default=Settings().preload_base)
    parser.add_argument("--precision", choices=["auto", "float32", "bfloat16"], default="auto")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--fresh", action="store_true", help="forget what was measured before")
    parser.add_argument("--out", type=Path, default=RESULTS, help="results file")
    return parser.parse_args()


def _code() -> str:
    from worker.calibration import code_version

    return code_version()


def _calibrate(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return the constants as a worker gets them: once more where kernels were compiled on the way."""
    asked = [str(folder), "auto", options.precision, str(options.threads)]
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-P", "-m", "luthier.training", "--calibrate", *asked],
            env=child_environment(options.threads),
            stdout=subprocess.PIPE,
            check=True,
        )
        found: dict[str, Any] = json.loads(done.stdout)
        if not found["is_cold"]:
            break
    print(f"calibrated in {found['probe_seconds']:.2f} s beside imports and loading", flush=True)
    return found


def _measure(
    options: argparse.Namespace,
    results: ResultsFile,
    name: str,
    facts: BaseFacts,
    folder: Path,
    data: Path,
    scratch: Path,
) -> None:
    """Estimate one method and train it as often as is asked for, but what was measured before."""
    calibration = results.content["rows"]["calibration"]
    told = _estimate(name, options, facts, folder, data, calibration["constants"])
    spec = told.spec
    row_name = f"{name}, dpo" if options.dpo else name
    row = results.row(row_name, fingerprint_of(spec.model_dump(mode="json"), calibration["fingerprint"]))
    seconds = told.seconds
    row["estimate"] = {
        "seconds": None if seconds is None else seconds.model_dump(exclude={"tokenize"}),
        "peak_memory_bytes": told.peak_memory_bytes,
        "artifact_bytes": told.artifact_bytes,
        "num_trained_parameters": told.num_trained_parameters,
        "steps": told.num_steps,
        "reason": told.reason,
    }
    runs: list[dict[str, Any]] = row.setdefault("runs", [])
    while len(runs) < options.runs:
        runs.append(_train(scratch / f"{row_name}-{len(runs)}", spec, folder, data))
        results.save()
        print(f"  {row_name}: {json.dumps(runs[-1]['seconds'])} {runs[-1]['peak_memory_bytes']}", flush=True)


def _estimate(
    name: str,
    options: argparse.Namespace,
    facts: BaseFacts,
    folder: Path,
    data: Path,
    constants: dict[str, Any],
) -> Estimate:
    spec = TrainingSpec(
        base_id=facts.id,
        tuning=check_tuning({"type": name}),
        hyperparameters=Hyperparameters(n_epochs=1),
        training=TrainingOptions(max_length=MAX_LENGTH, precision=options.precision, too_long="drop"),
        dpo=DpoOptions() if options.dpo else None,
        seed=SEED,
    )
    counts = count_rows(
        data,
        folder,
        max_length=MAX_LENGTH,
        too_long="drop",
        max_rows=options.rows,
        max_seconds=60.0,
        wants_pairs=options.dpo,
    )
    return estimate(
        spec,
        base=facts,
        shape=read_shape(folder),
        base_folder=folder,
        training=counts,
        validation=None,
        measured=Measured(Calibration.model_validate(constants), "benchmark", "here", 0),
        reason="",
        memory_bytes=None,
    )


def _train(folder: Path, spec: TrainingSpec, base: Path, data: Path) -> dict[str, Any]:
    """Run a cold training process, as the worker starts it."""
    folder.mkdir()
    rows, _ = prepare_rows(
        data,
        base,
        max_length=MAX_LENGTH,
        too_long="drop",
        purpose="training",
        wants_pairs=spec.dpo is not None,
    )
    write_prepared(rows, folder / "train.safetensors")
    (folder / "spec.json").write_text(spec.model_dump_json())
    inputs = RunInputs(job_id="bench", model_name="bench", base_path=str(base))
    (folder / "inputs.json").write_text(inputs.model_dump_json())
    with (folder / "log").open("wb") as log:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "luthier.training", str(folder)],
            env=child_environment(spec.num_threads or 1),
            stdout=subprocess.PIPE,
            stderr=log,
            check=False,
        )
    for event in map(parse_event, done.stdout.splitlines()):
        if isinstance(event, FailedEvent):
            raise SystemExit(f"{event.code}: {event.message}")
        if isinstance(event, FinishedEvent):
            report = event.report
            return {
                "seconds": report.seconds.model_dump(exclude={"tokenize"}),
                "peak_memory_bytes": report.peak_memory_bytes,
                "artifact_bytes": report.artifact_bytes,
                "num_trained_parameters": report.num_trained_parameters,
                "steps": report.steps_done,
                "path": report.path,
            }
    raise SystemExit(f"The training process ended early: {(folder / 'log').read_text()[-500:]}")


def make_table(rows: dict[str, Any]) -> str:
    """Return the results as a Markdown table: estimates, medians of the runs, and errors."""
    lines = [
        "| method | runs | s: estimate | measured | error | train only | MiB: estimate | measured | error |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in sorted(rows.items()):
        runs, told = row.get("runs"), row.get("estimate")
        if not runs or told["seconds"] is None:
            continue
        measured = {
            phase: statistics.median(run["seconds"][phase] for run in runs) for phase in told["seconds"]
        }
        total = statistics.median(sum(run["seconds"].values()) for run in runs)
        peak = statistics.median(run["peak_memory_bytes"] for run in runs)
        estimated = sum(told["seconds"].values())
        off = _off(estimated, total, MAX_SECONDS_OFF)
        train_off = _off(told["seconds"]["train"], measured["train"], MAX_SECONDS_OFF)
        bytes_off = _off(told["peak_memory_bytes"], peak, MAX_BYTES_OFF)
        lines.append(
            f"| {name} | {len(runs)} | {estimated:.1f} | {total:.1f} | {off} | {train_off} | "
            f"{told['peak_memory_bytes'] / 2**20:,.0f} | {peak / 2**20:,.0f} | {bytes_off} |"
        )
    return "\n".join(lines)


def _off(estimated: float, measured: float, most: float) -> str:
    share = estimated / measured - 1.0
    text = f"{share:+.0%}"
    return f"**{text}**" if abs(share) > most else text


if __name__ == "__main__":
    main()
