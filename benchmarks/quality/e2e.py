"""The text task: restaurants described from facts (E2E, Novikova et al., SIGDIAL 2017), read from a folder.

The data set is no part of the project: where its two files are absent, the task is left out and said to be.
"""

import json
import random
from pathlib import Path

from benchmarks.quality.scores import score_texts
from benchmarks.quality.task import Question, Row, Task

_SEED = 20_417


def load_e2e(folder: Path, num_rows: int, num_questions: int) -> Task | None:
    """Read the task.

    Args:
        folder: holds dev.jsonl to train on and test.jsonl to ask from, chat rows of one user turn and one
            assistant turn; several rows share a user turn and are its references.
        num_rows: training rows, one reference each of as many distinct inputs as there are.
        num_questions: distinct test inputs, with all their references.

    Returns:
        The task, always the same for the same numbers; None when a file is absent.
    """
    if not (folder / "dev.jsonl").is_file() or not (folder / "test.jsonl").is_file():
        return None
    chance = random.Random(_SEED)
    training = _references_of(folder / "dev.jsonl")
    rows = [Row((("user", facts),), chance.choice(texts)) for facts, texts in training.items()]
    chance.shuffle(rows)
    held_out = [(facts, texts) for facts, texts in _references_of(folder / "test.jsonl").items()]
    held_out = [(facts, texts) for facts, texts in held_out if facts not in training]
    chance.shuffle(held_out)
    return Task(
        name="e2e",
        title="text: E2E, facts to a sentence",
        metrics=("bleu", "chrf"),
        description="Write a fluent description of the restaurant that says every given fact.",
        rows=tuple(rows[:num_rows]),
        questions=tuple(
            Question((("user", facts),), tuple(texts)) for facts, texts in held_out[:num_questions]
        ),
        max_new_tokens=80,
        score=score_texts,
    )


def _references_of(path: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        question, answer = json.loads(line)["messages"]
        found.setdefault(question["content"], []).append(answer["content"])
    return found
