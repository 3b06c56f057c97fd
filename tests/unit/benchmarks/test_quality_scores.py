"""The scorers of the quality measurement: strict, and equal to the libraries they stand on."""

import json

import pytest

from benchmarks.quality.scores import score_labels, score_orders, score_texts

_ORDER = {
    "customer": "Ada Stone",
    "item": "oak shelf",
    "quantity": 1,
    "unit_price": 34.5,
    "deliver_on": "2027-03-12",
    "express": True,
}
_REFERENCE = (json.dumps(_ORDER),)


def test_a_label_counts_whatever_its_case_and_final_stop_and_nothing_more():
    references = [("alder",)] * 4
    assert score_labels([" Alder.\n", "alder", "alder, I think", "birch"], references) == {"accuracy": 50.0}


def _changed(**changes: object) -> str:
    return json.dumps(_ORDER | changes)


_SHUFFLED = json.dumps(dict(reversed(_ORDER.items())), indent=2)


@pytest.mark.parametrize(
    ("answer", "fields", "exact", "valid"),
    [
        # In any order and spacing.
        (f"\n{_SHUFFLED} ", 100.0, 100.0, 100.0),
        # A wrong member costs its share and the whole, an invented one too.
        (_changed(quantity=2), 100 * 5 / 6, 0.0, 100.0),
        (_changed(colour="red"), 100 * 6 / 7, 0.0, 100.0),
        # True is not one, and a number is not its text.
        (_changed(quantity=True, unit_price="34.5"), 100 * 4 / 6, 0.0, 0.0),
        # An unknown member breaks the schema.
        (_changed(phone="1"), 100 * 6 / 7, 0.0, 0.0),
        # What one JSON parse does not read scores nothing.
        (f"Here it is: {_REFERENCE[0]}", 0.0, 0.0, 0.0),
        (f"```json\n{_REFERENCE[0]}\n```", 0.0, 0.0, 0.0),
        (_REFERENCE[0][:-1], 0.0, 0.0, 0.0),
        (f"[{_REFERENCE[0]}]", 0.0, 0.0, 0.0),
        (_REFERENCE[0].replace("34.5", "NaN"), 0.0, 0.0, 0.0),
        (_REFERENCE[0].replace("}", ', "quantity": 1}'), 0.0, 0.0, 0.0),
        ("", 0.0, 0.0, 0.0),
    ],
)
def test_an_order_is_scored_by_its_members(answer, fields, exact, valid):
    scores = score_orders([answer], [_REFERENCE])
    assert scores == {"fields": pytest.approx(fields), "exact": exact, "valid": valid}


def test_texts_are_scored_against_the_best_of_all_references_even_when_their_numbers_differ():
    references = [
        ("The Mill is a cheap pub near the river.", "A cheap pub by the river is The Mill."),
        ("It is open.",),
    ]
    right = score_texts(["A cheap pub by the river is The Mill.", "It is open."], references)
    assert right == {"bleu": pytest.approx(100.0), "chrf": pytest.approx(100.0)}
    wrong = score_texts(["Nothing of that kind was said here.", "No."], references)
    assert wrong["bleu"] < 10
    assert wrong["chrf"] < 30
