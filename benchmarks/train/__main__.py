"""Training speed beside peers: `make bench-train`.

Each row trains one epoch of the same token rows, in the same batches where the peer allows it, from the
same base with the same batch size, rates and threads, ours and the peer's in turn. benchmarks/README.md says
how to read it.
"""

import argparse
import os
import shutil
import signal
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.machine import describe_machine
from benchmarks.results_file import ROOT, ResultsFile
from benchmarks.train.contestants import PeerFailedError
from benchmarks.train.growth import measure_growth
from benchmarks.train.ours import OursFailedError
from benchmarks.train.pairs import measure_row
from benchmarks.train.rows import (
    BATCH_SIZE,
    GROWTH,
    NUM_PAIRS,
    NUM_ROWS,
    ROWS,
    SEED,
    SHORT_JOB,
    SHORT_JOB_ROWS,
)
from benchmarks.train.short_job import JobFailedError, measure_short_job
from benchmarks.train.table import make_table
from benchmarks.train.workload import Workload, find_base, load_rows, make_workload
from examples.local_service import ServiceFailedError
from luthier.core.settings import Settings
from luthier.core.specs import BaseFacts
from luthier.data.prepare.prepared_rows import PreparedRows

RESULTS = ROOT / "benchmarks" / "results" / "train.json"
# Where tries go that are too short to be shown.
TRY_RESULTS = ROOT / ".work" / "bench-train.json"


@dataclass(frozen=True)
class Bench:
    """What all rows of one run share."""

    options: argparse.Namespace
    facts: BaseFacts
    base: Path
    device: str
    results: ResultsFile
    scratch: Path

    def workload(self, rows: PreparedRows, name: str) -> Workload:
        """Lay rows in our order, in a folder of the workload's name."""
        folder = self.scratch / name
        folder.mkdir(exist_ok=True)
        return make_workload(
            rows,
            self.facts,
            self.base,
            batch_size=BATCH_SIZE,
            seed=SEED,
            num_threads=self.options.threads,
            device=self.device,
            scratch=folder,
        )

    def rows(self, num_rows: int) -> PreparedRows:
        """Return the first rows of the data."""
        return load_rows(self.options.data, self.base, num_rows=num_rows, batch_size=BATCH_SIZE)


def main() -> None:
    """Measure what is asked for, print the table, write the results."""
    names = [name for name in [*ROWS, SHORT_JOB, GROWTH] if runs_on(name, "cpu")]
    options = parse_options(names, prog="python -m benchmarks.train", results=RESULTS)
    run_bench(options, "cpu", options.only or names)


def run_bench(options: argparse.Namespace, device: str, names: list[str]) -> None:
    """Measure some rows on a device.

    Args:
        options: the parsed command line.
        device: cpu or cuda.
        names: rows to measure, in this order.
    """
    facts, folder = find_base(options.base)
    # A TERM ends the blocks in order, as Ctrl-C does: peers, our processes and a service end with us.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    results = ResultsFile(options.out, describe_machine(), fresh=options.fresh)
    with tempfile.TemporaryDirectory(prefix="luthier-bench-") as scratch:
        bench = Bench(
            options,
            facts,
            folder,
            device,
            results,
            Path(scratch),
        )
        failed = []
        try:
            for name in names:
                failed += _measure(bench, name)
        finally:
            # Also when it is stopped: what was measured stands.
            results.save()
            table = make_table(results.content)
            options.out.with_suffix(".md").write_text(table)
            print(f"\n{table}\n{options.out} written", flush=True)
    if failed:
        raise SystemExit(f"Not finished: {', '.join(failed)}; the same command goes on from there.")


def _measure(bench: Bench, name: str) -> list[str]:
    """Measure one row; return its name when a run broke off: the other rows are measured all the same."""
    folder = bench.scratch / f"row-{name}"
    folder.mkdir()
    try:
        _run_row(bench, name, folder)
    except (OursFailedError, PeerFailedError, JobFailedError, ServiceFailedError) as error:
        print(f"  {name} broke off: {type(error).__name__}: {error}", flush=True)
        return [name]
    finally:
        shutil.rmtree(folder)
    return []


def _run_row(bench: Bench, name: str, folder: Path) -> None:
    options, results = bench.options, bench.results
    if name == SHORT_JOB:
        # A try has fewer, but the service takes no job of fewer than 10.
        num_rows = SHORT_JOB_ROWS if options.rows >= NUM_ROWS else max(2 * BATCH_SIZE, options.rows)
        short = bench.workload(bench.rows(num_rows), "short")
        measure_short_job(options.data, short, results, folder, num_pairs=options.pairs)
    elif name == GROWTH:
        grown = bench.workload(bench.rows(max(BATCH_SIZE, options.rows // 2)), "grown")
        measure_growth(grown, results, folder, bench.workload, num_rounds=options.pairs)
    else:
        workload = bench.workload(bench.rows(options.rows), "rows")
        measure_row(ROWS[name], workload, results, folder, num_pairs=options.pairs)


def parse_options(names: list[str], *, prog: str, results: Path) -> argparse.Namespace:
    """Read the command line.

    Args:
        names: rows that --only takes.
        prog: what the usage names.
        results: where a full measurement goes.

    Returns:
        The options; `only` is a list, `out` is set.
    """
    parser = argparse.ArgumentParser(prog=prog)
    parser.add_argument("--only", action="append", choices=names, metavar="ROW", help=", ".join(names))
    parser.add_argument("--pairs", type=int, default=NUM_PAIRS, help="pairs of runs a row (%(default)s)")
    parser.add_argument("--rows", type=int, default=None, help=f"training rows ({NUM_ROWS})")
    parser.add_argument("--data", type=Path, default=ROOT / "examples" / "support" / "train.jsonl")
    parser.add_argument("--base", default=Settings().preload_base)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--fresh", action="store_true", help="forget what was measured before")
    parser.add_argument("--out", type=Path, default=None, help="results file")
    options = parser.parse_args()
    is_full = options.rows is None and options.pairs >= NUM_PAIRS
    options.rows = options.rows or NUM_ROWS
    options.out = options.out or (results if is_full else TRY_RESULTS)
    return options


def runs_on(name: str, device: str) -> bool:
    """Whether a row is meant for a device."""
    return name in (SHORT_JOB, GROWTH) or device in ROWS[name].devices


if __name__ == "__main__":
    main()
