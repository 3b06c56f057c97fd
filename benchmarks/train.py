"""Training speed beside TRL's SFTTrainer at its best settings: `make bench-train`.

Both train one epoch of LoRA on the same token rows with the same mask, base, rank, batch size and
threads, in bf16 where that is their fastest; runs alternate, and the figure is the median of the pairs'
ratios of real tokens (padding not counted) a second, first step to last.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import gemm_gflops, steal_share
from luthier.bases.catalogue import base_folder, find_base_facts
from luthier.core.events import StartedEvent, StepEvent, parse_event
from luthier.core.settings import Settings
from luthier.core.specs import BaseFacts, Hyperparameters, RunInputs, TrainingOptions, TrainingSpec
from luthier.data.prepare import prepare_rows
from luthier.data.prepared import PreparedRows, write_prepared
from luthier.methods import check_tuning, resolve_spec

ROOT = Path(__file__).resolve().parent.parent
PEER_PYTHON = ROOT / ".venv-peers" / "trl" / "bin" / "python"
PEER_VARIANTS = ("grouped", "grouped-bf16", "packed")
TRL_REQUIREMENT = "trl==1.16.*"
RANK, BATCH_SIZE, SEED, LEARNING_RATE = 16, 8, 1, 1e-3


def ensure_peer() -> None:
    """Make the peer's own environment, once."""
    if PEER_PYTHON.exists():
        return
    print(f"Making {PEER_PYTHON.parent.parent} with {TRL_REQUIREMENT} (once)", flush=True)
    subprocess.run([sys.executable, "-m", "venv", PEER_PYTHON.parent.parent], check=True)
    packages = ["torch>=2.10", TRL_REQUIREMENT, "peft", "accelerate"]
    subprocess.run([PEER_PYTHON, "-m", "pip", "install", "-q", *packages], check=True)


def load_rows(path: Path, base: Path, num_rows: int) -> PreparedRows:
    """Tokenise the first rows of a chat file with our mask."""
    rows, _ = prepare_rows(path, base, max_length=1024, too_long="drop", purpose="training")
    return rows.select(range(min(num_rows, rows.num_rows)))


def run_ours(
    folder: Path, rows: PreparedRows, facts: BaseFacts, base: Path, num_threads: int
) -> dict[str, Any]:
    """Train one epoch by the training process and return seconds, losses and peak memory."""
    spec = TrainingSpec(
        base_id=facts.id,
        tuning=check_tuning({"type": "lora", "rank": RANK, "alpha": 2 * RANK}),
        hyperparameters=Hyperparameters(n_epochs=1, batch_size=BATCH_SIZE),
        training=TrainingOptions(learning_rate=LEARNING_RATE, save_every_steps=10_000),
        seed=SEED,
    )
    spec = resolve_spec(
        spec, base=facts, num_rows=rows.num_rows, num_tokens=rows.num_tokens, num_threads=num_threads
    )
    folder.mkdir()
    (folder / "spec.json").write_text(spec.model_dump_json())
    inputs = RunInputs(job_id="bench", model_name="bench", base_path=str(base), device="cpu")
    (folder / "inputs.json").write_text(inputs.model_dump_json())
    write_prepared(rows, folder / "train.safetensors")
    environment = os.environ | {"OMP_NUM_THREADS": str(num_threads), "HF_HUB_OFFLINE": "1"}
    with (
        (folder / "log").open("wb") as log,
        subprocess.Popen(
            [sys.executable, "-P", "-m", "luthier.training", str(folder)],
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
        ) as process,
    ):
        assert process.stdout is not None
        begin = end = 0.0
        steps: list[StepEvent] = []
        for line in process.stdout:
            event = parse_event(line)
            if isinstance(event, StartedEvent):
                begin = time.perf_counter()
            if isinstance(event, StepEvent):
                end = time.perf_counter()
                steps.append(event)
    if process.returncode != 0:
        raise SystemExit(f"our run failed: {(folder / 'log').read_text()[-2000:]}")
    losses = [step.metrics.train_loss or 0.0 for step in steps]
    return {
        "seconds": end - begin,
        "num_steps": len(steps),
        "first_loss": losses[0],
        "mean_loss": statistics.fmean(losses),
        "peak_memory_bytes": steps[-1].peak_memory_bytes,
    }


def run_peer(spec_path: Path, variant: str, spec: dict[str, Any]) -> dict[str, Any]:
    """Train one epoch by TRL in its own environment."""
    spec_path.write_text(json.dumps(spec | {"variant": variant}))
    result = subprocess.run(
        [PEER_PYTHON, ROOT / "benchmarks" / "peers" / "trl_sft.py", spec_path],
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode != 0:
        raise SystemExit(f"TRL ({variant}) failed: {result.stderr[-2000:]}")
    measured: dict[str, Any] = json.loads(result.stdout.strip().splitlines()[-1])
    return measured


def main() -> None:
    """Measure, print a table, write benchmarks/results/train.json."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--data", type=Path, default=ROOT / "examples" / "support" / "train.jsonl")
    arguments = parser.parse_args()
    settings = Settings()
    facts = find_base_facts(settings.bases_dir, settings.preload_base)
    if facts is None:
        raise SystemExit(f"Fetch the base first: luthier bases fetch {settings.preload_base}")
    base = base_folder(settings.bases_dir, facts.id).absolute()
    ensure_peer()
    num_threads = os.cpu_count() or 1
    rows = load_rows(arguments.data, base, arguments.rows)
    print(
        f"{rows.num_rows} rows, {rows.num_tokens} tokens, {rows.num_supervised_tokens} supervised; LoRA rank "
        f"{RANK}, all linear layers, batch {BATCH_SIZE}, {num_threads} threads, base {facts.id}",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as scratch:
        report = measure(Path(scratch), rows, facts, base, num_threads, arguments.pairs)
    results = ROOT / "benchmarks" / "results"
    results.mkdir(exist_ok=True)
    (results / "train.json").write_text(json.dumps(report, indent=1) + "\n")


def measure(
    scratch: Path, rows: PreparedRows, facts: BaseFacts, base: Path, num_threads: int, num_pairs: int
) -> dict[str, Any]:
    """Find the peer's best settings, then run alternating pairs."""
    np.savez(scratch / "rows.npz", tokens=rows.tokens, supervised=rows.supervised, offsets=rows.offsets)
    peer_spec = {
        "base": str(base),
        "rows": str(scratch / "rows.npz"),
        "rank": RANK,
        "alpha": 2 * RANK,
        "learning_rate": LEARNING_RATE,
        "batch_size": BATCH_SIZE,
        "seed": SEED,
        "num_threads": num_threads,
    }

    def speed(measured: dict[str, Any]) -> float:
        return float(rows.num_tokens / measured["seconds"])

    qualified: dict[str, float] = {}
    for variant in PEER_VARIANTS:
        qualified[variant] = speed(run_peer(scratch / "peer.json", variant, peer_spec))
        print(f"TRL {variant:13} {qualified[variant]:7.0f} tokens/s", flush=True)
    best = max(qualified, key=lambda variant: qualified[variant])
    pairs: list[dict[str, Any]] = []
    stolen_before, all_before = steal_share()
    for number in range(num_pairs):
        pair: dict[str, Any] = {}
        for who in ("ours", "trl") if number % 2 == 0 else ("trl", "ours"):
            if who == "ours":
                pair[who] = run_ours(scratch / f"run{number}", rows, facts, base, num_threads)
            else:
                pair[who] = run_peer(scratch / "peer.json", best, peer_spec)
        pair["ratio"] = pair["trl"]["seconds"] / pair["ours"]["seconds"]
        pairs.append(pair)
        told = ", ".join(
            f"{who} {speed(pair[who]):.0f} tokens/s (loss {pair[who]['mean_loss']:.3f})"
            for who in ("ours", "trl")
        )
        print(f"pair {number + 1}: {told}, ratio {pair['ratio']:.2f}", flush=True)
    stolen, everything = steal_share()
    report = {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "num_cores": os.cpu_count(),
            "gemm_gflops": {
                name: round(gemm_gflops(getattr(__import__("torch"), name)))
                for name in ("bfloat16", "float32")
            },
            "stolen_share": (stolen - stolen_before) / max(1, everything - all_before),
        },
        "rows": rows.num_rows,
        "tokens": rows.num_tokens,
        "trl_variants_tokens_per_second": qualified,
        "trl_best": best,
        "pairs": pairs,
        "ours_tokens_per_second": statistics.median(speed(pair["ours"]) for pair in pairs),
        "trl_tokens_per_second": statistics.median(speed(pair["trl"]) for pair in pairs),
        "ratio": statistics.median(pair["ratio"] for pair in pairs),
    }
    print(
        f"ours {report['ours_tokens_per_second']:.0f} tokens/s, TRL 1.16 ({best}) "
        f"{report['trl_tokens_per_second']:.0f} tokens/s: {report['ratio']:.2f} times (median of {num_pairs} "
        f"pairs); bf16 GEMM {report['machine']['gemm_gflops']['bfloat16']} GFLOP/s, stolen "
        f"{100 * report['machine']['stolen_share']:.1f} %",
        flush=True,
    )
    return report


if __name__ == "__main__":
    main()
