"""Whether our steps are Trainer's: losses in float32, step by step, beside the real transformers Trainer.

    python -m benchmarks.agreement [--rows 40] [--only lora]

Same rows, order, rates, threads and first adapter, both sides in float32. Exit code 1 when a step of any
method differs by more than MAX_GAP. Training amplifies every rounding; at a high rate so fast that after a
few steps the peer does not agree with itself, started from an adapter that is off by NUDGE. Where a step is
too large the peer's distance from itself is reported beside it; it excuses nothing. For `adapter`, the
`adapters` library draws its own first weights, so that only the first step's loss can be compared, which is
the base's on both sides.

Where results/train.json holds the row's pairs over as many rows, the losses of both sides in bf16 are then
compared with these in float32: that is what rounding does to each.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

from benchmarks.results_file import ROOT
from benchmarks.train.__main__ import RESULTS
from benchmarks.train.contestants import Order, run_peer
from benchmarks.train.ours import run_ours
from benchmarks.train.rows import BATCH_SIZE, NUM_ROWS, ROWS, SEED, Row
from benchmarks.train.workload import (
    Workload,
    find_base,
    learning_rates,
    load_rows,
    make_spec,
    make_workload,
    write_start,
)

# What the project promises, relative to Trainer's loss.
MAX_GAP = 1e-4
# Relative, to each number of the first adapter: about ten times what float32 rounds by.
NUDGE = 1e-6
_FLOAT32 = {"order": "ours", "weights": "float32"}
# Where the peer is Trainer with PEFT. LoRA is compared on both of its trainers.
_COMPARED = (
    "lora-trainer",
    "lora-trl",
    "prefix-trainer",
    "prompt-trainer",
    "full-trainer",
    "adapter-adapters",
)


def main() -> None:
    """Train every method on both sides; print the largest gap of each."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.agreement", description=__doc__)
    parser.add_argument("--rows", type=int, default=NUM_ROWS)
    parser.add_argument(
        "--only", action="append", choices=_COMPARED, metavar="ROW", help=", ".join(_COMPARED)
    )
    parser.add_argument("--data", type=Path, default=ROOT / "examples" / "support" / "train.jsonl")
    options = parser.parse_args()
    facts, folder = find_base()
    too_far = []
    with tempfile.TemporaryDirectory(prefix="luthier-agreement-") as name:
        scratch = Path(name)
        workload = make_workload(
            load_rows(options.data, folder, num_rows=options.rows, batch_size=BATCH_SIZE),
            facts,
            folder,
            batch_size=BATCH_SIZE,
            seed=SEED,
            num_threads=os.cpu_count() or 1,
            device="cpu",
            scratch=scratch,
        )
        print(f"{workload.num_steps} steps of {BATCH_SIZE} rows, float32; relative gap of the losses")
        for row in (ROWS[name] for name in options.only or _COMPARED):
            ours, peers, order = _losses(row, workload, scratch / row.name)
            gaps = _gaps(ours, peers)
            print(f"{row.title}: largest {max(gaps):.1e}; {_report(gaps)}", flush=True)
            _report_rounding(row, ours)
            if max(gaps) > MAX_GAP and order.start is not None:
                _nudge(order.start)
                own_gaps = _gaps(run_peer(order, scratch / row.name)["losses"], peers)
                print(
                    f"  the peer beside itself, started off by {NUDGE:.0e}: {_report(own_gaps)}", flush=True
                )
            if max(gaps) > MAX_GAP:
                too_far.append(row.name)
    if too_far:
        sys.exit(f"Further apart than {MAX_GAP:.0e}: {', '.join(too_far)}")


def _gaps(losses: list[float], others: list[float]) -> list[float]:
    return [abs(one - other) / abs(other) for one, other in zip(losses, others, strict=False)]


def _report(gaps: list[float]) -> str:
    return " ".join(f"{gap:.1e}" for gap in gaps)


def _nudge(start: Path) -> None:
    """Put every number of a first adapter off by a little."""
    import torch
    from safetensors.torch import load_file, save_file

    path = start / "adapter_model.safetensors"
    generator = torch.Generator().manual_seed(0)
    numbers = load_file(path)
    save_file(
        {
            name: one * (1 + NUDGE * torch.randn(one.shape, generator=generator))
            for name, one in numbers.items()
        },
        path,
    )


def _losses(row: Row, workload: Workload, scratch: Path) -> tuple[list[float], list[float], Order]:
    """Return our losses of every step, the peer's of those that can be compared, and what the peer ran."""
    scratch.mkdir()
    spec = make_spec(workload, row.tuning, precision="float32")
    start = write_start(workload, spec, scratch / "start")
    order = Order(
        environment=row.environment,
        script=row.script,
        options=_FLOAT32,
        tuning=spec.tuning,
        workload=workload,
        start=start,
        learning_rates=learning_rates(spec, workload.num_steps),
        device="cpu",
    )
    ours, peers = run_ours(scratch / "ours", workload, spec)["losses"], run_peer(order, scratch)["losses"]
    if len(ours) != len(peers):
        raise SystemExit(f"{row.name}: {len(ours)} steps of ours, {len(peers)} of the peer's")
    return ours, peers[:1] if row.environment == "adapters" else peers, order


def _report_rounding(row: Row, exact: list[float]) -> None:
    """Say how far from float32 both sides' losses were in the measured pairs, where there are any."""
    rows = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else {}
    pairs = rows.get(row.name, {}).get("pairs", [])
    if not pairs or any(len(pairs[-1][who]["losses"]) != len(exact) for who in ("ours", "peer")):
        return
    reported = {
        who: statistics.fmean(abs(a - b) for a, b in zip(pairs[-1][who]["losses"], exact, strict=True))
        for who in ("ours", "peer")
    }
    print(
        f"  in bf16, mean distance from float32: ours {reported['ours']:.3f}, "
        f"peer {reported['peer']:.3f} nats"
    )


if __name__ == "__main__":
    main()
