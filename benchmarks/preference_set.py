"""A preference set of our own: letters to a shop, each with the house's answer and one that misreads it.

Both answers have the same form. The other one has one label wrong (category, urgency or sentiment) and says
what would follow from it, so that only the letter decides which is right. Held-out letters share no
sentence with those of training (examples.support).
"""

import json
import random
from typing import Any

from examples.support.generate import SYSTEM, _reply, make_rows
from examples.support.heldout_phrases import HELDOUT
from examples.support.score import ALLOWED
from examples.support.training_phrases import TRAINING

SEED = 11


def make_preferences(
    num_training: int, num_heldout: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return OpenAI preference rows to train on, and others that share no sentence with them."""
    rng = random.Random(SEED)
    found = []
    for phrases, num_rows in ((TRAINING, num_training), (HELDOUT, num_heldout)):
        rows = make_rows(phrases, phrases.names, num_rows, rng)
        found.append([_preference(row.message, row.answer, row.name, row.thing, rng) for row in rows])
    return found[0], found[1]


def _preference(message: str, answer: str, name: str, thing: str, rng: random.Random) -> dict[str, Any]:
    labels = {key: value for key, value in json.loads(answer).items() if key != "reply"}
    wrong = rng.choice(sorted(labels))
    misread = labels | {wrong: rng.choice([one for one in sorted(ALLOWED[wrong]) if one != labels[wrong]])}
    other = json.dumps({**misread, "reply": _reply(misread, name, thing)})
    return {
        "input": {"messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": message}]},
        "preferred_output": [{"role": "assistant", "content": answer}],
        "non_preferred_output": [{"role": "assistant", "content": other}],
    }
