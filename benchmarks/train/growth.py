"""How our own time and memory grow: ten times the rows, four times the length.

Seconds a token and memory must not depend on the number of rows, and a row of T tokens must take a T + b T^2
seconds: the products grow with T, attention with its square. a and b are fitted on three lengths and must
predict a fourth.

Memory follows a run's largest step, and of more steps the largest is larger by chance. So the fewer rows are
put in an order whose largest step is as large as that of the many.
"""

import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.results_file import ResultsFile, code_digest, fingerprint_of
from benchmarks.train.ours import run_ours
from benchmarks.train.rows import GROWTH, LORA
from benchmarks.train.workload import Workload, make_spec
from luthier.data.prepare.prepared_rows import PreparedRows, join_rows

LENGTHS = (128, 256, 384, 512)
_STEPS_A_LENGTH = 4
# Enough steps that the first ones, in which memory is new, do not decide the smallest size's time.
_TIMES = 4
_MAX_GAP = 0.10
# Memory that the rows themselves may take: 10 bytes a token and allocation noise, far below one more copy.
_MAX_MEMORY_GROWTH = 0.02
# How near largest steps must be, and how many orders are looked through for it.
_LIKE, _MAX_ORDERS = 0.002, 1000


def measure_growth(
    workload: Workload,
    results: ResultsFile,
    scratch: Path,
    remake: Callable[[PreparedRows, str], Workload],
    *,
    num_rounds: int,
) -> dict[str, Any]:
    """Measure the row, going on where an earlier try stopped.

    Args:
        workload: the rows that are multiplied; their tokens fill the rows of fixed lengths.
        results: where every run is stored at once.
        scratch: an empty folder.
        remake: makes a workload of other rows; the text is a name of its own.
        num_rounds: how often each size is run; every other round in the opposite order.

    Returns:
        The row's results with its `summary`.
    """
    print(f"\nGrowth of ours alone ({GROWTH})", flush=True)
    base = repeat(workload.rows, _TIMES)
    many = remake(repeat(base, 10), "rows-10")
    sizes = {"rows x1": with_largest_step_of(many, remake(base, "rows-1")), "rows x10": many}
    for length in LENGTHS:
        cut = cut_to_length(base, length, workload.batch_size * _STEPS_A_LENGTH)
        sizes[f"length {length}"] = remake(cut, f"length-{length}")
    found = results.row(
        GROWTH, fingerprint_of(LORA, workload.digest, LENGTHS, _TIMES, sizes["rows x1"].seed, code_digest())
    )
    rounds: list[dict[str, Any]] = found.setdefault("rounds", [])
    while len(rounds) < num_rounds:
        names = list(sizes) if len(rounds) % 2 == 0 else list(reversed(sizes))
        measured: dict[str, Any] = {}
        for name in names:
            size = sizes[name]
            reported = run_ours(
                scratch / f"{len(rounds)}-{name.replace(' ', '-')}", size, make_spec(size, LORA)
            )
            measured[name] = {
                "seconds": reported["seconds"],
                "num_tokens": reported["num_tokens"],
                "num_rows": size.rows.num_rows,
                "largest_step_tokens": max(size.computed_tokens_of_steps()),
                "memory_bytes": reported["memory_bytes"],
            }
            speed = reported["num_tokens"] / reported["seconds"]
            print(f"  round {len(rounds) + 1}: {name:12} {speed:6.0f} tokens/s", flush=True)
        rounds.append(measured)
        found["summary"] = summarise(rounds)
        results.save()
    return found


def summarise(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Return how time and memory grow, from the medians of all rounds.

    Args:
        rounds: each with every size's seconds, tokens, rows and memory.

    Returns:
        Ratios, the fitted curve, and whether they are within the bars.
    """

    def median(name: str, value: Callable[[dict[str, Any]], float]) -> float:
        return statistics.median(value(measured[name]) for measured in rounds)

    def second_per_token(run: dict[str, Any]) -> float:
        return float(run["seconds"] / run["num_tokens"])

    by_rows = statistics.median(
        second_per_token(r["rows x10"]) / second_per_token(r["rows x1"]) for r in rounds
    )
    memory = statistics.median(r["rows x10"]["memory_bytes"] / r["rows x1"]["memory_bytes"] for r in rounds)
    times = {
        length: median(f"length {length}", lambda run: run["seconds"] / run["num_rows"]) for length in LENGTHS
    }
    a, b = fit(times, LENGTHS[:3])
    foretold = a * LENGTHS[3] + b * LENGTHS[3] ** 2
    gap = times[LENGTHS[3]] / foretold - 1
    return {
        "rows_x10_seconds_per_token_ratio": by_rows,
        "rows_x10_memory_ratio": memory,
        "largest_step_tokens": {
            name: rounds[0][name]["largest_step_tokens"] for name in ("rows x1", "rows x10")
        },
        "seconds_per_row": {str(length): seconds for length, seconds in times.items()},
        "fit": {"a": a, "b": b, "lengths": LENGTHS[:3]},
        "length_x4_gap": gap,
        "is_within_bars": abs(by_rows - 1) <= _MAX_GAP
        and abs(gap) <= _MAX_GAP
        and memory - 1 <= _MAX_MEMORY_GROWTH,
    }


def fit(seconds: dict[int, float], lengths: tuple[int, ...]) -> tuple[float, float]:
    """Fit a T + b T^2 by least squares on the relative gaps.

    Args:
        seconds: of a row, by its length.
        lengths: which of them to fit on.

    Returns:
        a and b.
    """
    times = np.array([seconds[length] for length in lengths])
    terms = np.array([[length, length**2] for length in lengths]) / times[:, None]
    (a, b), *_ = np.linalg.lstsq(terms, np.ones(len(lengths)), rcond=None)
    return float(a), float(b)


def with_largest_step_of(many: Workload, few: Workload) -> Workload:
    """Return the few rows in an order, by its seed, whose largest step is like that of the many.

    What is written for peers stays in the order that it had.

    Raises:
        SystemExit: when no order is found.
    """
    wanted = max(many.computed_tokens_of_steps())
    for seed in range(many.seed, many.seed + _MAX_ORDERS):
        ordered = replace(few, seed=seed)
        if abs(max(ordered.computed_tokens_of_steps()) / wanted - 1) <= _LIKE:
            return ordered
    raise SystemExit(f"No order of {few.rows.num_rows} rows has a step of about {wanted} tokens.")


def repeat(rows: PreparedRows, times: int) -> PreparedRows:
    """Return the rows one after the other, several times."""
    return rows.select(list(range(rows.num_rows)) * times)


def cut_to_length(rows: PreparedRows, length: int, num_rows: int) -> PreparedRows:
    """Lay all tokens end to end, as often as needed, and cut rows of one length from them.

    Args:
        rows: where tokens and mask come from.
        length: tokens of every row.
        num_rows: how many.

    Returns:
        The rows, each with supervised tokens as the source has them.
    """
    needed = length * num_rows
    tokens = np.resize(rows.tokens, needed).reshape(num_rows, length)
    supervised = np.resize(rows.supervised, needed).reshape(num_rows, length)
    return join_rows(list(tokens), list(supervised), list(range(1, num_rows + 1)))
