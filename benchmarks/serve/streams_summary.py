"""What the rounds of a row of streams come to."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.pairs import MAX_STOLEN, median_interval
from benchmarks.roofline import Shape
from benchmarks.serve.limits import Limits, Work, best_tokens_per_second
from benchmarks.serve.published import Published

OURS = "ours"


def kept(rounds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rounds in which the host took little time."""
    return [one for one in rounds if one["stolen_share"] <= MAX_STOLEN]


def summarise(found: dict[str, Any], models: Sequence[Published | None], shape: Shape) -> dict[str, Any]:
    """Return medians, shares and ratios over the rounds that count.

    Args:
        found: the row, with its rounds.
        models: of its streams.
        shape: of the base.

    Returns:
        The `summary`.
    """
    rounds = kept(found["rounds"]) or found["rounds"]
    num_new = found["num_new_tokens"]
    names = list(rounds[0]["runs"])
    # Virtual tokens are no weights of linear layers.
    weights = sum(
        model.num_parameters for model in models if model is not None and model.kind in ("lora", "adapter")
    )
    sizes = (found["num_streams"], found["num_prompt_tokens"], num_new, weights, weights)
    work = Work(shape, *sizes)
    bounds = [best_tokens_per_second(work, Limits(**one["limits"])) for one in rounds]

    def median(name: str, key: str) -> float:
        return statistics.median(one["runs"][name][key] for one in rounds)

    def share(name: str, bound: str) -> float:
        speeds = [one["runs"][name]["tokens_per_second"] for one in rounds]
        return statistics.median(speed / one[bound] for speed, one in zip(speeds, bounds, strict=True))

    summary: dict[str, Any] = {
        "num_rounds": len(rounds),
        "tokens_per_second": {name: median(name, "tokens_per_second") for name in names},
        "limit_tokens_per_second": {
            key: statistics.median(bound[key] for bound in bounds) for key in bounds[0]
        },
        "share_of_limit": {name: {key: share(name, key) for key in ("steps", "run")} for name in names},
        "ours": {
            key: median(OURS, key)
            for key in ("first_token_seconds_p50", "gap_seconds_p50", "gap_seconds_p99")
        },
        "limits": {
            key: statistics.median(one["limits"][key] for one in rounds) for key in rounds[0]["limits"]
        },
        "stolen_share": statistics.median(one["stolen_share"] for one in rounds),
        "has_equal_tokens": all(
            count == num_new for one in rounds for run in one["runs"].values() for count in run["num_tokens"]
        ),
        "ratios": {},
        "agreement": {},
    }
    for name in names:
        if name == OURS:
            continue
        ratios = [
            one["runs"][OURS]["tokens_per_second"] / one["runs"][name]["tokens_per_second"] for one in rounds
        ]
        summary["ratios"][name] = asdict(median_interval(ratios))
        held = [one["runs"][name].get("agreement") for one in rounds]
        if held[0] is not None:
            summary["agreement"][name] = {key: statistics.fmean(one[key] for one in held) for key in held[0]}
    return summary
