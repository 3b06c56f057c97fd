"""The label task: reports about a building are routed to one of eight desks with names that say nothing.

Every word list is in routing_words.py; nothing here depends on anything but the seed.
"""

import random

from benchmarks.quality.routing_words import DESKS, HELDOUT, TRAINING, Words
from benchmarks.quality.scores import score_labels
from benchmarks.quality.task import Question, Row, Task

SYSTEM = (
    f"You route reports about a building. Answer with the one desk that looks after it: {', '.join(DESKS)}."
)
_SEED = 20_417
_ASIDE_SHARE = 0.4


def make_routing(num_rows: int, num_questions: int) -> Task:
    """Make the task.

    Args:
        num_rows: training rows; all desks equally often.
        num_questions: held-out rows, from the held-out words only.

    Returns:
        The task, always the same for the same numbers.
    """
    rows = _make_rows(TRAINING, num_rows, random.Random(_SEED))
    questions = _make_rows(HELDOUT, num_questions, random.Random(_SEED + 1))
    return Task(
        name="routing",
        title="labels: building reports to 8 desks",
        metrics=("accuracy",),
        description="Read a report about a building and name the desk that looks after what is broken.",
        rows=tuple(rows),
        questions=tuple(Question(row.prompt, (row.answer,)) for row in questions),
        max_new_tokens=8,
        score=score_labels,
    )


def _make_rows(words: Words, num_rows: int, chance: random.Random) -> list[Row]:
    desks = [DESKS[number % len(DESKS)] for number in range(num_rows)]
    chance.shuffle(desks)
    rows: list[Row] = []
    seen: set[str] = set()
    for desk in desks:
        report = _report(words, desk, chance)
        while report in seen:
            report = _report(words, desk, chance)
        seen.add(report)
        rows.append(Row((("system", SYSTEM), ("user", report)), desk))
    return rows


def _report(words: Words, desk: str, chance: random.Random) -> str:
    topic = words.topics[desk]
    sentences = [
        chance.choice(words.reports).format(
            thing=chance.choice(topic.things),
            fault=chance.choice(topic.faults),
            place=chance.choice(words.places),
        )
    ]
    if chance.random() < _ASIDE_SHARE:
        other = chance.choice([name for name in DESKS if name != desk])
        aside = chance.choice(words.asides).format(other=chance.choice(words.topics[other].things))
        sentences.insert(chance.randint(0, 1), aside)
    sentences.append(chance.choice(words.closings).format(name=chance.choice(words.names)))
    return " ".join(sentences).strip()
