"""Scores an answer against its reference: is it the exact structure, and are its labels right?

Strict on purpose: what a program could not read with one `json.loads` and a lookup counts as wrong. This
file must never learn to repair an answer.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

ALLOWED: dict[str, frozenset[str]] = {
    "category": frozenset({"account", "billing", "booking", "delivery", "repair", "return"}),
    "urgency": frozenset({"low", "normal", "high"}),
    "sentiment": frozenset({"positive", "neutral", "negative"}),
}
KEYS = (*ALLOWED, "reply")


@dataclass(frozen=True)
class Score:
    """One answer's score.

    `num_enumerated_right` counts the labels that equal the reference, of `num_enumerated`; an answer whose
    structure is broken has none.
    """

    is_valid_structure: bool
    num_enumerated_right: int
    num_enumerated: int = len(ALLOWED)


@dataclass(frozen=True)
class Summary:
    """Shares over all rows, from 0 to 1. Labels are counted over every row, valid or not."""

    num_rows: int
    valid_structure_share: float
    enumerated_right_share: float


def _refuse_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a key is given twice")
    return members


def parse_answer(answer: str) -> dict[str, str] | None:
    """Return the answer's members, or None when it is not exactly the agreed structure.

    Args:
        answer: the whole text of the model's answer; white space around it is allowed.
    """
    try:
        members = json.loads(answer.strip(), object_pairs_hook=_refuse_repeats)
    except (ValueError, RecursionError):
        return None
    if not isinstance(members, dict) or set(members) != set(KEYS):
        return None
    if not all(isinstance(value, str) for value in members.values()):
        return None
    if any(members[key] not in allowed for key, allowed in ALLOWED.items()):
        return None
    return members if members["reply"].strip() else None


def score_answer(answer: str, reference: str) -> Score:
    """Score one answer.

    Args:
        answer: the model's whole answer.
        reference: the row's own assistant turn.

    Returns:
        The score; no label counts when the structure is broken.

    Raises:
        ValueError: when the reference itself breaks the structure.
    """
    expected = parse_answer(reference)
    if expected is None:
        raise ValueError("The reference does not have the agreed structure.")
    found = parse_answer(answer)
    if found is None:
        return Score(is_valid_structure=False, num_enumerated_right=0)
    return Score(is_valid_structure=True, num_enumerated_right=sum(found[k] == expected[k] for k in ALLOWED))


def summarise(scores: Iterable[Score]) -> Summary:
    """Return the shares over all scores.

    Raises:
        ValueError: when there are no scores.
    """
    rows = list(scores)
    if not rows:
        raise ValueError("There is nothing to summarise.")
    return Summary(
        num_rows=len(rows),
        valid_structure_share=sum(row.is_valid_structure for row in rows) / len(rows),
        enumerated_right_share=sum(r.num_enumerated_right for r in rows)
        / sum(r.num_enumerated for r in rows),
    )
