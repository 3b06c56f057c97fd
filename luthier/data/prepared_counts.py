"""Lengths of prepared rows as an estimate wants them: all of a small file, of a large one a sample."""

import functools

import numpy as np
from numpy.typing import NDArray

from luthier.data.count import RowCounts
from luthier.data.prepared import PreparedRows

MAX_EXAMPLES = 2000


def count_prepared(rows: PreparedRows, *, has_pairs: bool, max_examples: int = MAX_EXAMPLES) -> RowCounts:
    """Return the counts of rows that prepare has made.

    Args:
        rows: the rows; of preferences two beside each other.
        max_examples: examples that are looked at; of more, an even choice by length with the longest.

    Returns:
        The counts. What rows begin with alike is told for all, not for each pair.
    """
    per_example = 2 if has_pairs else 1
    longest = rows.lengths.reshape(-1, per_example).max(axis=1, initial=0)
    num_examples = len(longest)
    places = np.linspace(0, num_examples - 1, min(max_examples, num_examples)).astype(np.int64)
    examples = np.sort(np.argsort(longest, kind="stable")[places])
    chosen = (examples[:, None] * per_example + np.arange(per_example)).ravel()
    # A row's first token is never predicted.
    found = [rows.row(int(index)) for index in chosen]
    masks = [mask[1:] for _, mask in found]
    beginnings = [tokens[: int(mask.argmax())] for (tokens, _), mask in zip(found, masks, strict=True)]
    return RowCounts(
        rows.lengths[chosen],
        np.array([int(mask.sum()) for mask in masks], dtype=np.int64),
        num_examples,
        len(examples),
        0,
        0,
        has_pairs=has_pairs,
        num_shared=len(functools.reduce(_beginning, beginnings)) if beginnings else 0,
    )


def _beginning(one: NDArray[np.int32], other: NDArray[np.int32]) -> NDArray[np.int32]:
    both = min(len(one), len(other))
    differing = (one[:both] != other[:both]).nonzero()[0]
    return one[: differing[0] if len(differing) else both]
