"""Training on preferences: whether held-out pairs are ranked rightly, and whether the loss is TRL's.

    python -m benchmarks.preferences [--method lora] [--method full] [--rows 400] [--epochs 3]
    python -m benchmarks.preferences --agree [--method lora] [--method full]

The first trains on our preference set (preference_set.py) and prints the reward accuracy on held-out pairs
before and after. The second trains a few steps in float32 beside TRL's DPOTrainer, on the same pairs in the
same order from the same weights, and ends with 1 when a loss differs by more than MAX_GAP.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.agreement import MAX_GAP
from benchmarks.preference_set import make_preferences
from benchmarks.train.contestants import Order, quiet_environment, run_peer
from benchmarks.train.workload import Workload, find_base, learning_rates, write_start
from luthier.core.events import FailedEvent, FinishedEvent, StepEvent, TrainingEvent, parse_event
from luthier.core.specs import (
    BaseFacts,
    DpoOptions,
    Hyperparameters,
    RunInputs,
    TrainingOptions,
    TrainingSpec,
)
from luthier.data.prepare.preference_pairs import make_pair_plan
from luthier.data.prepare.preparation import prepare_rows
from luthier.data.prepare.prepared_rows import PreparedRows, write_prepared
from luthier.methods._tuning import check_tuning, resolve_spec

# Those whose first weights can be handed over to TRL.
_METHODS = ["lora", "full"]
_PAIRS, _NUM_HELDOUT = 400, 100
_AGREE_PAIRS, _AGREE_BATCH, _AGREE_BETA = 24, 4, 0.1


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.preferences", description=__doc__)
    parser.add_argument("--method", action="append", help="may be given again; lora and full")
    parser.add_argument("--rows", type=int, help=f"pairs to train on; {_PAIRS}, with --agree {_AGREE_PAIRS}")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument(
        "--rate", type=float, default=None, help='the peak rate; what "auto" takes when left out'
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--agree", action="store_true", help="compare losses with TRL's")
    options = parser.parse_args()
    facts, folder = find_base()
    with tempfile.TemporaryDirectory(prefix="luthier-preferences-") as name:
        if options.agree:
            _agree(Path(name), facts, folder, options)
            return
        for method in options.method or _METHODS:
            _learn(Path(name) / method, facts, folder, method, options)


def _learn(run: Path, facts: BaseFacts, folder: Path, method: str, options: argparse.Namespace) -> None:
    training, heldout = make_preferences(options.rows or _PAIRS, _NUM_HELDOUT)
    spec = TrainingSpec(
        base_id=facts.id,
        tuning=check_tuning({"type": method}),
        hyperparameters=Hyperparameters(n_epochs=options.epochs),
        training=TrainingOptions(learning_rate=options.rate),
        dpo=DpoOptions(),
        seed=1,
    )
    _write_run(run, facts, folder, spec, training, heldout, options.threads)
    finished, _ = _run(run, options.threads)
    report = finished.report
    print(
        f"{method}: {len(training)} pairs, {finished.step} steps, {report.seconds.train:.0f} s, "
        f"rate {report.spec.training.learning_rate:g}; on {_NUM_HELDOUT} held-out pairs:"
    )
    for evaluation in report.evaluations:
        print(
            f"  step {evaluation.step}: "
            f"reward accuracy {100 * (evaluation.valid_reward_accuracy or 0):.1f} %, "
            f"margin {evaluation.valid_reward_margin:.3f}, loss {evaluation.valid_loss:.3f}, "
            f"forgetting {evaluation.forgetting or 0:.3f}",
            flush=True,
        )


def _prepare(rows: list[dict[str, Any]], path: Path, folder: Path) -> PreparedRows:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return prepare_rows(
        path, folder, max_length=1024, too_long="error", purpose="training", wants_pairs=True
    )[0]


def _write_run(
    run: Path,
    facts: BaseFacts,
    folder: Path,
    spec: TrainingSpec,
    training: list[dict[str, Any]],
    heldout: list[dict[str, Any]],
    num_threads: int,
) -> TrainingSpec:
    run.mkdir()
    rows = _prepare(training, run / "rows.jsonl", folder)
    write_prepared(rows, run / "train.safetensors")
    if heldout:
        write_prepared(_prepare(heldout, run / "rows.jsonl", folder), run / "validation.safetensors")
    resolved = resolve_spec(
        spec, base=facts, num_rows=rows.num_rows // 2, num_tokens=rows.num_tokens, num_threads=num_threads
    )
    (run / "spec.json").write_text(resolved.model_dump_json())
    inputs = RunInputs(job_id="bench", model_name="bench", base_path=str(folder), device="cpu")
    (run / "inputs.json").write_text(inputs.model_dump_json())
    return resolved


def _run(run: Path, num_threads: int) -> tuple[FinishedEvent, list[StepEvent]]:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "luthier.training", str(run)],
        stdout=subprocess.PIPE,
        env=quiet_environment(num_threads),
        check=False,
    )
    events: list[TrainingEvent] = [parse_event(line) for line in done.stdout.splitlines()]
    if not events or not isinstance(events[-1], FinishedEvent):
        reported = events[-1].message if events and isinstance(events[-1], FailedEvent) else done.returncode
        raise SystemExit(f"The training failed: {reported}")
    return events[-1], [event for event in events if isinstance(event, StepEvent)]


def _agree(scratch: Path, facts: BaseFacts, folder: Path, options: argparse.Namespace) -> None:
    """Compare every method's losses with TRL's; end with 1 when some differ by too much."""
    too_far = []
    for method in options.method or _METHODS:
        (scratch / method).mkdir()
        ours, peers = _losses(scratch / method, facts, folder, method, options)
        gaps = [abs(a - b) / abs(b) for a, b in zip(ours, peers, strict=True)]
        print(f"losses {' '.join(f'{loss:.4f}' for loss in ours)}")
        print(
            f"{method} beside TRL's DPOTrainer, float32: largest gap {max(gaps):.1e} over {len(gaps)} steps",
            flush=True,
        )
        if max(gaps) > MAX_GAP:
            too_far.append(method)
    if too_far:
        sys.exit(f"Further apart than {MAX_GAP:.0e}: {', '.join(too_far)}")


def _losses(
    scratch: Path, facts: BaseFacts, folder: Path, method: str, options: argparse.Namespace
) -> tuple[list[float], list[float]]:
    """Train on the same pairs by both; return our losses and TRL's."""
    num_threads: int = options.threads
    training, _ = make_preferences(options.rows or _AGREE_PAIRS, 1)
    spec = TrainingSpec(
        base_id=facts.id,
        tuning=check_tuning({"type": method}),
        hyperparameters=Hyperparameters(n_epochs=1, batch_size=_AGREE_BATCH),
        training=TrainingOptions(precision="float32", save_every_steps=1_000_000),
        dpo=DpoOptions(beta=_AGREE_BETA),
        seed=1,
    )
    resolved = _write_run(scratch / "ours", facts, folder, spec, training, [], num_threads)
    rows = _prepare(training, scratch / "rows.jsonl", folder)
    plan = make_pair_plan(rows.lengths, batch_size=_AGREE_BATCH, num_epochs=1, seed=spec.seed)
    ordered = rows.select(np.concatenate(plan.steps).tolist())
    peer_file = scratch / "rows.npz"
    np.savez(peer_file, tokens=ordered.tokens, supervised=ordered.supervised, offsets=ordered.offsets)
    workload = Workload(rows, facts, folder, _AGREE_BATCH, spec.seed, num_threads, "cpu", peer_file)
    order = Order(
        environment="trl",
        script="trl_dpo",
        options={"weights": "float32", "beta": _AGREE_BETA},
        tuning=resolved.tuning,
        workload=workload,
        start=write_start(workload, resolved, scratch / "start"),
        learning_rates=learning_rates(resolved, plan.num_steps),
        device="cpu",
    )
    _, steps = _run(scratch / "ours", num_threads)
    ours = [step.metrics.train_loss or 0.0 for step in steps]
    peers = run_peer(order, scratch)["losses"]
    if len(ours) != len(peers):
        raise SystemExit(f"{len(ours)} steps of ours, {len(peers)} of TRL's")
    return ours, peers


if __name__ == "__main__":
    main()
