"""Makes the bundled data set: `python -m examples.support.generate` writes the three files beside it.

A row is a system turn (the same for all, silent about the structure), a customer's message and the house's
answer: one JSON object. Labels follow from the message's own words. Training and validation rows mix the
same sentences, under different names; held-out rows share no name, instrument, sentence or run of six words
with them (tests/unit/examples holds it). Nothing here may depend on anything but the seed.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from examples.support.heldout_phrases import HELDOUT
from examples.support.phrases import Phrases
from examples.support.score import ALLOWED
from examples.support.training_phrases import TRAINING

FOLDER = Path(__file__).parent
SYSTEM = "You answer letters for Hollin & Wren, a violin workshop."
SEED = 1742
NUM_ROWS = {"train": 240, "validation": 30, "heldout": 64}
NUM_VALIDATION_NAMES = 8

_GREETING = {
    "positive": "How kind, {name}!",
    "neutral": "Thank you, {name}.",
    "negative": "So sorry, {name}.",
}
_DEED = {
    "account": "We open your page",
    "billing": "We check your bill",
    "booking": "We set your time",
    "delivery": "We trace the {thing}",
    "repair": "We mend the {thing}",
    "return": "We take the {thing} back",
}
_WHEN = {"low": "in good time", "normal": "this week", "high": "today"}
_FAREWELL = "Warmly, the bench"


@dataclass(frozen=True)
class Row:
    """One row, with what it was built from so that a test can compare the files' ingredients."""

    message: str
    answer: str
    name: str
    thing: str
    sentences: tuple[str, ...]

    def to_line(self) -> str:
        """Return the row as one line of an OpenAI chat file, without a line break."""
        turns = (("system", SYSTEM), ("user", self.message), ("assistant", self.answer))
        return json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]})


class _Deck:
    """Deals a tuple's members in random order, each once before any comes twice."""

    def __init__(self, members: tuple[str, ...], rng: random.Random) -> None:
        self._members, self._rng = members, rng
        self._left: list[str] = []

    def deal(self) -> str:
        if not self._left:
            self._left = self._rng.sample(self._members, len(self._members))
        return self._left.pop()


def _reply(labels: dict[str, str], name: str, thing: str) -> str:
    greeting = _GREETING[labels["sentiment"]].format(name=name)
    deed = _DEED[labels["category"]].format(thing=thing)
    return f"{greeting} {deed} {_WHEN[labels['urgency']]}. {_FAREWELL}"


def _labels_in_turn(num_rows: int, rng: random.Random) -> Iterator[dict[str, str]]:
    """Yield labels so that every combination comes about equally often."""
    combinations = list(product(*(sorted(allowed) for allowed in ALLOWED.values())))
    dealt: list[tuple[str, ...]] = []
    while len(dealt) < num_rows:
        dealt += rng.sample(combinations, len(combinations))
    for combination in dealt[:num_rows]:
        yield dict(zip(ALLOWED, combination, strict=True))


def make_rows(phrases: Phrases, names: tuple[str, ...], num_rows: int, rng: random.Random) -> list[Row]:
    """Return rows built from one lot of phrases.

    Args:
        phrases: the sentences and instruments to use.
        names: the customers' names to use.
        num_rows: how many rows to make.
        rng: the only source of chance.
    """
    name_deck, thing_deck = _Deck(names, rng), _Deck(phrases.things, rng)
    aside_deck, signature_deck = _Deck(phrases.asides, rng), _Deck(phrases.signatures, rng)
    problem_decks = {label: _Deck(texts, rng) for label, texts in phrases.problems.items()}
    tone_decks = {label: _Deck(texts, rng) for label, texts in phrases.tones.items()}
    haste_decks = {label: _Deck(texts, rng) for label, texts in phrases.hastes.items()}
    rows = []
    for labels in _labels_in_turn(num_rows, rng):
        name, thing = name_deck.deal(), thing_deck.deal()
        body = [problem_decks[labels["category"]].deal(), haste_decks[labels["urgency"]].deal()]
        tone = tone_decks[labels["sentiment"]].deal()
        # Neutral tones are mostly greetings, so they open the message; others may open it or close it.
        is_opener = labels["sentiment"] == "neutral" or rng.random() < 0.6
        body.insert(0 if is_opener else len(body), tone)
        body.insert(rng.randrange(1, len(body) + 1), aside_deck.deal())
        sentences = tuple(text for text in (*body, signature_deck.deal()) if text)
        message = " ".join(sentences).format(name=name, thing=thing)
        answer = json.dumps({**labels, "reply": _reply(labels, name, thing)})
        rows.append(Row(message, answer, name, thing, sentences))
    return rows


def make_data_set(seed: int = SEED) -> dict[str, list[Row]]:
    """Return the rows of every file, by the file's name without its ending."""
    rng = random.Random(seed)
    train_names = TRAINING.names[NUM_VALIDATION_NAMES:]
    validation_names = TRAINING.names[:NUM_VALIDATION_NAMES]
    return {
        "train": make_rows(TRAINING, train_names, NUM_ROWS["train"], rng),
        "validation": make_rows(TRAINING, validation_names, NUM_ROWS["validation"], rng),
        "heldout": make_rows(HELDOUT, HELDOUT.names, NUM_ROWS["heldout"], rng),
    }


def main() -> None:
    """Write the three files."""
    for name, rows in make_data_set().items():
        path = FOLDER / f"{name}.jsonl"
        path.write_text("".join(f"{row.to_line()}\n" for row in rows), encoding="utf-8")
        print(f"{path.name}: {len(rows)} rows")


if __name__ == "__main__":
    main()
