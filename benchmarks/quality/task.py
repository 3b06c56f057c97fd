"""What a task is: rows to train on, questions to answer, and how the answers are scored."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

# (role, content), oldest first, without the answer.
Prompt = tuple[tuple[str, str], ...]
# Scores by name, shares and percentages as the metric defines them.
Scorer = Callable[[Sequence[str], Sequence[Sequence[str]]], dict[str, float]]


@dataclass(frozen=True)
class Row:
    """A training row: turns up to the question, and the answer to learn."""

    prompt: Prompt
    answer: str

    def to_line(self) -> str:
        """Return the row as one line of a chat file, without a line break."""
        return json.dumps({"messages": to_messages((*self.prompt, ("assistant", self.answer)))})


@dataclass(frozen=True)
class Question:
    """A held-out question and every answer that counts as right."""

    prompt: Prompt
    references: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """A task to tune for.

    `metrics` are the names of its scores, the first being the one that is compared; `description` is what
    a person would write as a prompt, for the initialisations by text; `score` takes answers and references.
    """

    name: str
    title: str
    metrics: tuple[str, ...]
    description: str
    rows: tuple[Row, ...]
    questions: tuple[Question, ...]
    max_new_tokens: int
    score: Scorer


def to_messages(turns: Prompt) -> list[dict[str, str]]:
    """Return turns as OpenAI's messages."""
    return [{"role": role, "content": content} for role, content in turns]


def with_examples(question: Prompt, examples: Sequence[Row]) -> Prompt:
    """Put solved examples before a question as earlier turns, under the question's own system turn."""
    system = tuple(turn for turn in question if turn[0] == "system")
    solved = tuple(
        turn
        for row in examples
        for turn in (*(turn for turn in row.prompt if turn[0] != "system"), ("assistant", row.answer))
    )
    return (*system, *solved, *(turn for turn in question if turn[0] != "system"))
