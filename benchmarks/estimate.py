"""How near estimates come to what is then measured: `python -m benchmarks.estimate`.

For every method: what the service would estimate before any job has finished on the base, and after one
over twice as many rows has; beside short runs of the training process, with `--dpo` over pairs of our
preference set (preference_set.py). Medians of the runs; the bars are 35 % for seconds before, 20 % after,
15 % for memory. Stopped, it continues from the runs it has.
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
from benchmarks.train.workload import find_base
from luthier.core.cost_model import DeviceSpeed
from luthier.core.events import FailedEvent, FinishedEvent, RunReport, parse_event
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
from luthier.data.prepare.preparation import prepare_rows
from luthier.data.prepare.prepared_rows import write_prepared
from luthier.data.prepare.row_counts import count_rows
from luthier.methods import discover
from luthier.methods._tuning import check_tuning
from services.capacity.estimates import Estimate, Grounds, estimate
from services.capacity.speeds import finished_job
from worker.training_process.child import child_environment

RESULTS = ROOT / "benchmarks" / "results" / "estimate.json"
NUM_ROWS = 24
NUM_RUNS = 5
MAX_LENGTH = 1024
SEED = 7
MAX_OFF_BEFORE, MAX_OFF_AFTER, MAX_BYTES_OFF = 0.35, 0.20, 0.15


def main() -> None:
    """Measure what is missing, print the table."""
    options = _parse_options()
    facts, folder = find_base(options.base)
    from benchmarks.machine import describe_machine

    results = ResultsFile(options.out, describe_machine(), fresh=options.fresh)
    with tempfile.TemporaryDirectory(prefix="luthier-bench-") as scratch:
        data = Path(scratch) / "rows.jsonl"
        data.write_bytes(_make_rows(options, options.rows))
        row = results.row("speed", fingerprint_of(facts.digest, options.threads, options.precision))
        if "device" not in row:
            row["device"] = _measure_speed(options)
            results.save()
        for name in options.only or list(discover()):
            _measure(options, results, name, facts, folder, data, Path(scratch))
    print(make_table(results.content["rows"]))
    print(f"{options.out} written")


def _make_rows(options: argparse.Namespace, num_rows: int) -> bytes:
    if options.dpo:
        pairs, _ = make_preferences(num_rows, 1)
        return b"".join(json.dumps(row).encode() + b"\n" for row in pairs)
    with options.data.open("rb") as stream:
        return b"".join(line for line, _ in zip(stream, range(num_rows), strict=False))


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


def _measure_speed(options: argparse.Namespace) -> dict[str, Any]:
    """Return the speed of the device as a worker measures it."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "luthier.training", "--measure-speed", "auto", str(options.threads)],
        env=child_environment(options.threads),
        stdout=subprocess.PIPE,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout)
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
    speed = DeviceSpeed.model_validate(results.content["rows"]["speed"]["device"])
    row_name = f"{name}, dpo" if options.dpo else name
    earlier = scratch / f"{row_name}-earlier.jsonl"
    earlier.write_bytes(_make_rows(options, 2 * options.rows))
    before = _estimate(name, options, facts, folder, data, options.rows, Grounds(speed))
    spec = before.spec
    row = results.row(row_name, fingerprint_of(spec.model_dump(mode="json"), facts.digest))
    runs: list[dict[str, Any]] = row.setdefault("runs", [])
    if "earlier" not in row:
        earlier_spec = _estimate(name, options, facts, folder, earlier, 2 * options.rows, Grounds(speed)).spec
        row["earlier"] = _train(scratch / f"{row_name}-earlier", earlier_spec, folder, earlier)
    while len(runs) < options.runs:
        runs.append(_train(scratch / f"{row_name}-{len(runs)}", spec, folder, data))
        results.save()
        print(f"  {row_name}: {json.dumps(runs[-1]['report']['seconds'])}", flush=True)
    finished = [
        finished_job(
            RunReport.model_validate(row["earlier"]["report"]),
            read_shape(folder),
            num_scored_tokens=0,
            num_reference_tokens=row["earlier"]["num_tokens"],
            tokens_per_example=row["earlier"]["num_tokens"] / (2 * options.rows),
        )
    ]
    after = _estimate(name, options, facts, folder, data, options.rows, Grounds(speed, finished))
    row["estimate"] = {
        "before": _phases(before),
        "after": _phases(after),
        "peak_memory_bytes": before.peak_memory_bytes,
        "artifact_bytes": before.artifact_bytes,
    }
    results.save()


def _phases(found: Estimate) -> dict[str, float]:
    assert found.seconds is not None
    return found.seconds.model_dump(exclude={"total"})


def _estimate(
    name: str,
    options: argparse.Namespace,
    facts: BaseFacts,
    folder: Path,
    data: Path,
    num_rows: int,
    grounds: Grounds,
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
        num_rows=num_rows,
        max_length=MAX_LENGTH,
        too_long="drop",
        max_rows=num_rows,
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
        grounds=grounds,
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
            return {"report": event.report.model_dump(mode="json"), "num_tokens": rows.num_tokens}
    raise SystemExit(f"The training process ended early: {(folder / 'log').read_text()[-500:]}")


def make_table(rows: dict[str, Any]) -> str:
    """Return the results as a Markdown table: estimates, medians of the runs, and errors."""
    columns = "method | runs | s: measured | before a job | error | after one | error"
    lines = [f"| {columns} | MiB: measured | estimate | error |", "|---" * 10 + "|"]
    for name, row in sorted(rows.items()):
        if "estimate" not in row:
            continue
        reports, estimates = [run["report"] for run in row["runs"]], row["estimate"]
        seconds = statistics.median(_total(report["seconds"]) for report in reports)
        peak = statistics.median(report["peak_memory_bytes"] for report in reports)
        cells = [name, str(len(reports)), f"{seconds:.1f}"]
        for phase, most in (("before", MAX_OFF_BEFORE), ("after", MAX_OFF_AFTER)):
            total = _total(estimates[phase])
            cells += [f"{total:.1f}", _off(total, seconds, most)]
        need = estimates["peak_memory_bytes"]
        cells += [f"{peak / 2**20:,.0f}", f"{need / 2**20:,.0f}", _off(need, peak, MAX_BYTES_OFF)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _total(phases: dict[str, float]) -> float:
    return sum(seconds for phase, seconds in phases.items() if phase != "tokenize")


def _off(estimated: float, measured: float, most: float) -> str:
    share = estimated / measured - 1.0
    text = f"{share:+.0%}"
    return f"**{text}**" if abs(share) > most else text


if __name__ == "__main__":
    main()
