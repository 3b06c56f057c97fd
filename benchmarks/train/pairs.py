"""One row of the table: try the peer's variants, then run alternating pairs beside the fastest."""

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import StolenTime, gemm_peaks, read_shape, step_flops
from benchmarks.results_file import ResultsFile, code_digest, fingerprint_of
from benchmarks.train.contestants import Order, PeerFailedError, run_peer
from benchmarks.train.ours import run_ours
from benchmarks.train.rows import Row, Variant
from benchmarks.train.workload import Workload, learning_rates, make_spec, write_start

# A pair during which the host took more than this share of the time is run again.
MAX_STOLEN = 0.02
# bf16 keeps 8 bits: a product is off by up to 0.4 %, many of them and the steps after by a few times that.
MAX_LOSS_GAP = 0.02
# A number of tries that stands for a host that is never quiet.
_MAX_TRIES_A_PAIR = 2


@dataclass(frozen=True)
class Interval:
    """A median and the 95 % bootstrap interval around it."""

    median: float
    low: float
    high: float


def median_interval(values: Sequence[float]) -> Interval:
    """Return the median of some ratios and its percentile bootstrap interval (Efron 1979), always the same.

    Args:
        values: at least one.

    Returns:
        Median, 2.5th and 97.5th percentile of the medians of 10,000 samples with replacement.
    """
    generator = random.Random(0)
    medians = sorted(statistics.median(generator.choices(values, k=len(values))) for _ in range(10_000))
    return Interval(statistics.median(values), medians[249], medians[9749])


def measure_row(
    row: Row, workload: Workload, results: ResultsFile, scratch: Path, *, num_pairs: int
) -> dict[str, Any]:
    """Measure a row, going on where an earlier try of the same stopped.

    Args:
        row: what to measure beside which peer.
        workload: the rows of tokens.
        results: where every run is stored at once.
        scratch: an empty folder of this row.
        num_pairs: pairs to have in the end.

    Returns:
        The row's results with its `summary`; with `failed` instead when the peer can't run.
    """
    print(f"\n{row.title} ({row.name})", flush=True)
    found = results.row(row.name, fingerprint_of(asdict(row), workload.digest, code_digest()))
    found["workload"] = workload.describe()
    spec = make_spec(workload, row.tuning)
    start = write_start(workload, spec, scratch / "start")

    def order(variant: Variant) -> Order:
        return Order(
            environment=row.environment,
            script=row.script,
            options=variant.options,
            tuning=spec.tuning,
            workload=workload,
            start=start,
            learning_rates=learning_rates(spec, workload.num_steps),
            device=workload.device,
        )

    best = choose_variant(
        row, workload.device, found, results, lambda variant: run_peer(order(variant), scratch)
    )
    if best is None:
        return found
    if best.has_our_order and "exact_losses" not in found:
        exact = make_spec(workload, row.tuning, precision="float32")
        found["exact_losses"] = run_ours(_new_folder(scratch), workload, exact)["losses"]
        results.save()
    shape = read_shape(workload.base_folder)
    pairs: list[dict[str, Any]] = found.setdefault("pairs", [])
    tries = 0
    while len(_kept(pairs)) < num_pairs and tries < num_pairs * _MAX_TRIES_A_PAIR:
        tries += 1
        pair: dict[str, Any] = {
            "gemm_gflops": gemm_peaks(shape, _step_tokens(workload), workload.num_threads, workload.device)
        }
        stolen = StolenTime()
        # A B B A: whatever drifts, drifts for both.
        for who in ("ours", "peer") if len(pairs) % 2 == 0 else ("peer", "ours"):
            if who == "ours":
                pair[who] = run_ours(_new_folder(scratch), workload, spec)
            else:
                pair[who] = run_peer(order(best), scratch)
        pair["stolen_share"] = stolen.share()
        pair["ratio"] = pair["peer"]["seconds"] / pair["ours"]["seconds"]
        pairs.append(pair)
        found["summary"] = summarise(row, best, found, workload, spec.tuning)
        results.save()
        _report_pair(len(pairs), pair, workload)
    return found


def choose_variant(
    row: Row,
    device: str,
    found: dict[str, Any],
    results: ResultsFile,
    run: Callable[[Variant], dict[str, Any]],
) -> Variant | None:
    """Run every variant once, and return the fastest of equal loss and precision; None when none runs."""
    tried: dict[str, dict[str, Any]] = found.setdefault("variants", {})
    variants = [variant for variant in row.variants if device in variant.devices]
    for variant in variants:
        if variant.name not in tried:
            try:
                tried[variant.name] = run(variant)
            except PeerFailedError as error:
                tried[variant.name] = {"failed": str(error)}
            results.save()
        reported = tried[variant.name]
        if "failed" in reported:
            print(f"  {variant.name:28} fails: {reported['failed']}", flush=True)
        else:
            speed = reported["num_tokens"] / reported["seconds"]
            print(f"  {variant.name:28} {speed:7.0f} tokens/s", flush=True)
    eligible = [
        variant
        for variant in variants
        if variant.has_our_loss and variant.has_our_precision and "failed" not in tried[variant.name]
    ]
    if not eligible:
        failures = [reported["failed"] for reported in tried.values() if "failed" in reported]
        found["failed"] = failures[0] if failures else "no setting has our loss and our precision"
        results.save()
        return None
    found.pop("failed", None)
    best = min(eligible, key=lambda v: tried[v.name]["seconds"] / tried[v.name]["num_tokens"])
    found["best_variant"] = best.name
    return best


def summarise(
    row: Row, best: Variant, found: dict[str, Any], workload: Workload, tuning: dict[str, Any]
) -> dict[str, Any]:
    """Return medians over the pairs that count, and whether both sides did the same work."""
    pairs = _kept(found["pairs"]) or found["pairs"]
    ratio = median_interval([pair["ratio"] for pair in pairs])
    memory = median_interval([pair["ours"]["memory_bytes"] / pair["peer"]["memory_bytes"] for pair in pairs])
    flops = step_flops(
        read_shape(workload.base_folder),
        tuning,
        num_tokens=workload.rows.num_tokens,
        num_supervised=workload.num_supervised_tokens,
        num_rows=workload.rows.num_rows,
    )

    def speed(who: str) -> float:
        return statistics.median(workload.rows.num_tokens / pair[who]["seconds"] for pair in pairs)

    def share(who: str) -> float:
        return statistics.median(
            flops / pair[who]["seconds"] / 1e9 / pair["gemm_gflops"]["bfloat16"] for pair in pairs
        )

    counts = {
        (pair[who]["num_tokens"], pair[who]["num_supervised_tokens"])
        for pair in pairs
        for who in ("ours", "peer")
    }
    return {
        "num_pairs": len(pairs),
        "peer_variant": best.name,
        "tokens_per_second": {"ours": speed("ours"), "peer": speed("peer")},
        "ratio": asdict(ratio),
        "bar": row.bar,
        "is_above_bar": ratio.low >= row.bar,
        "memory_bytes": {
            who: statistics.median(pair[who]["memory_bytes"] for pair in pairs) for who in ("ours", "peer")
        },
        "memory_ratio": asdict(memory),
        "memory_bar": row.memory_bar,
        "gemm_roofline_share": {"ours": share("ours"), "peer": share("peer")},
        "gemm_gflops": {
            name: statistics.median(pair["gemm_gflops"][name] for pair in pairs)
            for name in ("bfloat16", "float32")
        },
        "has_equal_tokens": len(counts) == 1,
        "losses": compare_losses(pairs, found.get("exact_losses")),
        "stolen_share": statistics.median(pair["stolen_share"] for pair in pairs),
    }


def compare_losses(pairs: list[dict[str, Any]], exact: list[float] | None) -> dict[str, Any]:
    """Say how much the two sides' losses differ, in nats per supervised token.

    Args:
        pairs: with both sides' losses.
        exact: our losses in float32, of the same rows in the same steps; None where a step of the one did not
            see the rows of the same step of the other.

    Returns:
        The means of both curves and, step by step, the first, the mean and the largest gap of the last pair,
        the mean gap of each side to float32, and whether the gaps between the sides, and ours to float32, are
        within what rounding in bf16 leaves.
    """
    ours, peer = pairs[-1]["ours"]["losses"], pairs[-1]["peer"]["losses"]
    reported: dict[str, Any] = {"ours_mean": statistics.fmean(ours), "peer_mean": statistics.fmean(peer)}
    if exact is not None and len(ours) == len(peer) == len(exact):
        gaps = _gaps(ours, peer)
        reported |= {"first_gap": gaps[0], "mean_gap": statistics.fmean(gaps), "largest_gap": max(gaps)}
        reported["agree"] = reported["mean_gap"] <= MAX_LOSS_GAP * reported["ours_mean"]
        reported["gap_to_exact"] = {
            "ours": statistics.fmean(_gaps(ours, exact)),
            "peer": statistics.fmean(_gaps(peer, exact)),
        }
        reported["is_exact"] = reported["gap_to_exact"]["ours"] <= MAX_LOSS_GAP * reported["ours_mean"]
    return reported


def _gaps(losses: list[float], others: list[float]) -> list[float]:
    return [abs(a - b) for a, b in zip(losses, others, strict=True)]


def _kept(pairs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [pair for pair in pairs if pair["stolen_share"] <= MAX_STOLEN]


def _step_tokens(workload: Workload) -> int:
    return round(workload.rows.num_tokens / workload.num_steps)


def _new_folder(scratch: Path) -> Path:
    return scratch / f"run-{sum(1 for _ in scratch.glob('run-*'))}"


def _report_pair(number: int, pair: dict[str, Any], workload: Workload) -> None:
    speeds = {who: workload.rows.num_tokens / pair[who]["seconds"] for who in ("ours", "peer")}
    megabytes = {who: pair[who]["memory_bytes"] / 1e6 for who in ("ours", "peer")}
    print(
        f"  pair {number}: ours {speeds['ours']:.0f}, peer {speeds['peer']:.0f} tokens/s: "
        f"{pair['ratio']:.2f} times; memory {megabytes['ours']:.0f} and {megabytes['peer']:.0f} MB; "
        f"path {pair['ours']['path']}; bf16 GEMM {pair['gemm_gflops']['bfloat16']:.0f} GFLOP/s; "
        f"stolen {100 * pair['stolen_share']:.1f} %",
        flush=True,
    )
