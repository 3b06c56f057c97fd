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


def _score(answer: str) -> dict[str, float]:
    return score_orders([answer], [_REFERENCE])


def test_a_label_counts_whatever_its_case_and_final_stop_and_nothing_more() -> None:
    references = [("alder",)] * 4
    assert score_labels([" Alder.\n", "alder", "alder, I think", "birch"], references) == {"accuracy": 50.0}


def test_the_right_object_is_right_in_any_order_and_spacing() -> None:
    shuffled = json.dumps(dict(reversed(_ORDER.items())), indent=2)
    assert _score(f"\n{shuffled} ") == {"fields": 100.0, "exact": 100.0, "valid": 100.0}


@pytest.mark.parametrize(
    "answer",
    [
        f"Here it is: {_REFERENCE[0]}",
        f"```json\n{_REFERENCE[0]}\n```",
        _REFERENCE[0][:-1],
        f"[{_REFERENCE[0]}]",
        _REFERENCE[0].replace("34.5", "NaN"),
        _REFERENCE[0].replace("}", ', "quantity": 1}'),
        "",
    ],
)
def test_what_one_json_parse_does_not_read_scores_nothing(answer: str) -> None:
    assert _score(answer) == {"fields": 0.0, "exact": 0.0, "valid": 0.0}


def test_a_wrong_member_costs_its_share_and_the_whole() -> None:
    assert _score(json.dumps(_ORDER | {"quantity": 2})) == {
        "fields": pytest.approx(100 * 5 / 6),
        "exact": 0.0,
        "valid": 100.0,
    }


def test_an_invented_member_counts_against_an_answer() -> None:
    scores = _score(json.dumps(_ORDER | {"colour": "red"}))
    assert scores == {"fields": pytest.approx(100 * 6 / 7), "exact": 0.0, "valid": 100.0}


def test_true_is_not_one_and_a_number_is_not_its_text() -> None:
    scores = _score(json.dumps(_ORDER | {"quantity": True, "unit_price": "34.5"}))
    assert scores == {"fields": pytest.approx(100 * 4 / 6), "exact": 0.0, "valid": 0.0}


def test_an_unknown_member_breaks_the_schema() -> None:
    assert _score(json.dumps(_ORDER | {"phone": "1"}))["valid"] == 0.0


def test_texts_are_scored_against_the_best_of_all_references_even_when_their_numbers_differ() -> None:
    references = [
        ("The Mill is a cheap pub near the river.", "A cheap pub by the river is The Mill."),
        ("It is open.",),
    ]
    right = score_texts(["A cheap pub by the river is The Mill.", "It is open."], references)
    assert right == {"bleu": pytest.approx(100.0), "chrf": pytest.approx(100.0)}
    wrong = score_texts(["Nothing of that kind was said here.", "No."], references)
    assert wrong["bleu"] < 10
    assert wrong["chrf"] < 30
