"""What is computed from measured numbers: percentiles, agreement, traffic. Pure functions only."""

import random
from collections.abc import Sequence
from statistics import fmean


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value below which a share of the values is, interpolated between its neighbours.

    Args:
        values: at least one.
        share: 0 to 1.

    Returns:
        The percentile.
    """
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def agreement(ours: Sequence[Sequence[int]], peers: Sequence[Sequence[int]]) -> dict[str, float]:
    """Say how far two sides' answers are the same, token by token.

    Greedy answers in bf16 part for good at the first token on which rounding decides, so what counts is how
    long they go together.

    Args:
        ours: token ids of each answer.
        peers: the other side's, in the same order.

    Returns:
        `first_token`: share of the answers whose first token is equal; `leading`: mean share of an answer
        before its first difference; `equal`: share of all tokens equal at their place.
    """
    pairs = list(zip(ours, peers, strict=True))
    leading, equal, total = [], 0, 0
    for one, other in pairs:
        length = max(1, min(len(one), len(other)))
        same = [a == b for a, b in zip(one, other, strict=False)]
        leading.append((same.index(False) if False in same else len(same)) / length)
        equal += sum(same)
        total += length
    first = [bool(one) and bool(other) and one[0] == other[0] for one, other in pairs]
    return {"first_token": fmean(first), "leading": fmean(leading), "equal": equal / total}


def zipf_picks(count: int, num_models: int, *, seed: int) -> list[int]:
    """Draw models as often as Zipf's law has words: the k-th most wanted 1/k as often as the first.

    Args:
        count: how many to draw.
        num_models: models there are.
        seed: of the draw.

    Returns:
        Numbers of models from 0.
    """
    weights = [1 / (rank + 1) for rank in range(num_models)]
    return random.Random(seed).choices(range(num_models), weights=weights, k=count)


def uniform_picks(count: int, num_models: int, *, seed: int) -> list[int]:
    """Draw models, each as likely as any other.

    Args:
        count: how many to draw.
        num_models: models there are.
        seed: of the draw.

    Returns:
        Numbers of models from 0.
    """
    return random.Random(seed).choices(range(num_models), k=count)


def slope(places: Sequence[float], values: Sequence[float]) -> float:
    """Return the steepness of the line that fits best (least squares).

    Args:
        places: at least two different ones.
        values: one a place.

    Returns:
        The change of the value over a change of the place by one.
    """
    mean_place, mean_value = fmean(places), fmean(values)
    above = sum((p - mean_place) * (v - mean_value) for p, v in zip(places, values, strict=True))
    return above / sum((p - mean_place) ** 2 for p in places)
