"""Scoring: only the exact structure counts, and only equal labels are right."""

import json

import pytest

from examples.support.score import Score, parse_answer, score_answer, summarise

LABELS = {"category": "repair", "urgency": "high", "sentiment": "neutral"}
REFERENCE = json.dumps({**LABELS, "reply": "Thank you, Ada. We mend the kora today. Warmly, the bench"})


def _answer(**changes: object) -> str:
    return json.dumps({**json.loads(REFERENCE), **changes})


@pytest.mark.parametrize(
    ("answer", "num_right"),
    [
        *[(text, 3) for text in (REFERENCE, f"  {REFERENCE}\n", json.dumps(json.loads(REFERENCE), indent=2))],
        (_answer(reply="Yes."), 3),
        (_answer(urgency="low"), 2),
        (_answer(urgency="low", category="billing"), 1),
        (_answer(sentiment="positive"), 2),
    ],
)
def test_of_an_exact_structure_each_label_counts_by_itself(answer, num_right):
    assert score_answer(answer, REFERENCE) == Score(is_valid_structure=True, num_enumerated_right=num_right)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "Thank you for your message.",
        f"```json\n{REFERENCE}\n```",
        f"Here it is: {REFERENCE}",
        f"{REFERENCE} I hope that helps.",
        f"{REFERENCE}\n{REFERENCE}",
        f"[{REFERENCE}]",
        REFERENCE.replace('"', "'"),
        REFERENCE[:-1],
        REFERENCE[:-1] + ",}",
        REFERENCE[:-1] + ', "urgency": "high"}',
        _answer(team="strings"),
        json.dumps(LABELS),
        json.dumps({**LABELS, "Reply": "Yes."}),
        _answer(category="Repair"),
        _answer(category=" repair"),
        _answer(urgency="urgent"),
        _answer(sentiment=None),
        _answer(category=["repair"]),
        _answer(reply=""),
        _answer(reply="  "),
        _answer(reply=7),
        "null",
        "NaN",
        "[" * 100_000,
    ],
)
def test_anything_else_is_invalid_and_no_label_counts(answer):
    assert parse_answer(answer) is None
    assert score_answer(answer, REFERENCE) == Score(is_valid_structure=False, num_enumerated_right=0)


def test_a_broken_reference_is_refused():
    with pytest.raises(ValueError, match="reference"):
        score_answer(REFERENCE, "{}")


def test_a_summary_counts_labels_over_all_rows_valid_or_not():
    summary = summarise([Score(True, 3), Score(True, 1), Score(False, 0), Score(True, 2)])
    assert (summary.num_rows, summary.valid_structure_share, summary.enumerated_right_share) == (4, 0.75, 0.5)


def test_a_summary_of_nothing_is_refused():
    with pytest.raises(ValueError, match="nothing"):
        summarise([])
