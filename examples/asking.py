"""Asking a model for the answers of rows, by the official SDK. A row is a conversation that ends with the
reference answer, which no model is ever shown.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

from openai import OpenAI

from examples.support.score import Summary, score_answer, summarise

MAX_ANSWER_TOKENS = 96
NUM_CONCURRENT_REQUESTS = 16

Row = list[dict[str, str]]


def _prompt(row: Row) -> Any:
    return row[:-1]


def ask(client: OpenAI, model: str, row: Row) -> str:
    """Return a model's most likely answer to a row's message."""
    completion = client.chat.completions.create(
        model=model, messages=_prompt(row), temperature=0, max_tokens=MAX_ANSWER_TOKENS
    )
    return completion.choices[0].message.content or ""


def await_first_token(client: OpenAI, model: str, row: Row) -> None:
    """Return as soon as a streamed answer has begun.

    Raises:
        RuntimeError: when the stream ends without any text.
    """
    with client.chat.completions.create(
        model=model, messages=_prompt(row), temperature=0, max_tokens=4, stream=True
    ) as stream:
        for chunk in stream:
            if chunk.choices and chunk.choices[0].delta.content:
                return
    raise RuntimeError(f"The stream of {model} ended without any text.")


def score(client: OpenAI, model: str, rows: list[Row]) -> Summary:
    """Ask for every row's answer, several at a time, and score them."""
    with ThreadPoolExecutor(NUM_CONCURRENT_REQUESTS) as pool:
        answers = list(pool.map(lambda row: ask(client, model, row), rows))
    return summarise(
        score_answer(answer, row[-1]["content"]) for answer, row in zip(answers, rows, strict=True)
    )
