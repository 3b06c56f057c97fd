"""Scores of answers against references. Strict on purpose: nothing here may ever repair an answer."""

import json
from collections.abc import Sequence
from typing import Any, NoReturn

# Eight members, two of them optional: what an order form would take.
ORDER_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "customer": {"type": "string", "minLength": 1},
        "item": {"type": "string", "minLength": 1},
        "quantity": {"type": "integer", "minimum": 1},
        "unit_price": {"type": "number", "exclusiveMinimum": 0},
        "deliver_on": {"type": "string", "pattern": "^[0-9]{4}-[0-9]{2}-[0-9]{2}$"},
        "express": {"type": "boolean"},
        "colour": {"type": "string", "minLength": 1},
        "note": {"type": "string", "minLength": 1},
    },
    "required": ["customer", "item", "quantity", "unit_price", "deliver_on", "express"],
    "additionalProperties": False,
}


def score_labels(answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return the percentage of answers that are the label: case, white space and a final stop don't count."""
    right = [
        _plain(answer) in map(_plain, allowed) for answer, allowed in zip(answers, references, strict=True)
    ]
    return {"accuracy": 100 * sum(right) / len(right)}


def score_texts(answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Score texts by sacrebleu with all references of each, BLEU (Papineni 2002) and chrF (Popovic 2015).

    Args:
        answers: one text a question.
        references: one or more texts a question.

    Returns:
        `bleu` and `chrf`, from 0 to 100.
    """
    import sacrebleu

    # sacrebleu wants streams: the n-th reference of every question, None where a question has fewer.
    most = max(map(len, references))
    streams = [
        [texts[number] if number < len(texts) else None for texts in references] for number in range(most)
    ]
    return {
        "bleu": sacrebleu.corpus_bleu(answers, streams).score,  # type: ignore[arg-type]
        "chrf": sacrebleu.corpus_chrf(answers, streams).score,  # type: ignore[arg-type]
    }


def score_orders(answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Score JSON objects.

    Args:
        answers: one text a question; the whole text must be the object, white space around it aside.
        references: the one right object a question, as JSON.

    Returns:
        Percentages: `fields` of members that are right, over all that either side has; `exact` of whole
        objects that are right; `valid` of answers that the schema accepts.
    """
    import jsonschema

    validator = jsonschema.Draft202012Validator(ORDER_SCHEMA)
    shares, num_valid = [], 0
    for answer, (reference,) in zip(answers, references, strict=True):
        found = parse_object(answer)
        num_valid += found is not None and validator.is_valid(found)
        shares.append(_share_right(found or {}, json.loads(reference)))
    return {
        "fields": 100 * sum(shares) / len(shares),
        "exact": 100 * sum(share == 1.0 for share in shares) / len(shares),
        "valid": 100 * num_valid / len(shares),
    }


def parse_object(answer: str) -> dict[str, Any] | None:
    """Return the object that an answer is, or None when it is anything else or a member comes twice."""
    try:
        found = json.loads(answer, object_pairs_hook=_refuse_repeats, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _share_right(found: dict[str, Any], expected: dict[str, Any]) -> float:
    names = found.keys() | expected.keys()
    return sum(
        name in found and name in expected and _equal(found[name], expected[name]) for name in names
    ) / len(names)


def _equal(found: Any, expected: Any) -> bool:
    # Python holds True for 1; a form would not.
    return isinstance(found, bool) == isinstance(expected, bool) and bool(found == expected)


def _plain(label: str) -> str:
    return label.strip().rstrip(".").lower()


def _refuse_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a member comes twice")
    return members


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")
