"""Rows for tests, made here so that every test sees what it sends."""

import json
import re
from typing import Any

from luthier.data.formats.base import Fault, Row, RowFormat
from luthier.data.readers.detect_format import check_row


def read_line(row_format: RowFormat, line: bytes) -> Row | None:
    """Return the row of a line, or None when it breaks a rule."""
    row = check_row(row_format, line, 1)
    assert not (isinstance(row, list) and row_format.accepts_by_type(line)), row
    return None if isinstance(row, list) else row_format.make_row(row)


def explain_line(row_format: RowFormat, line: bytes, number: int) -> list[Fault]:
    """Return the faults of a line."""
    row = check_row(row_format, line, number)
    return row if isinstance(row, list) else []


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case."""
    return re.findall(r"[a-z']+", text.lower())


def runs_of_six(texts: list[str]) -> set[tuple[str, ...]]:
    """Return all runs of six words that texts have."""
    many = map(words_of, texts)
    return {tuple(words[start : start + 6]) for words in many for start in range(len(words) - 5)}


def chat_row(user: str, assistant: str, **extra: Any) -> dict[str, Any]:
    """Return one chat row; `extra` goes into the assistant's message."""
    return {
        "messages": [
            {"role": "user", "content": user},
            {"role": "assistant", "content": assistant, **extra},
        ]
    }


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    """Return rows as a JSONL file."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def colour_rows(num_rows: int = 12) -> list[dict[str, Any]]:
    """Return rows that teach a small, strict answer."""
    return [
        chat_row(f"what is the colour of number {number}?", f'{{"colour": "red", "number": {number}}}')
        for number in range(num_rows)
    ]


def preference_row(user: str, preferred: str, other: str) -> dict[str, Any]:
    """Return one preference row."""
    return {
        "input": {"messages": [{"role": "user", "content": user}]},
        "preferred_output": [{"role": "assistant", "content": preferred}],
        "non_preferred_output": [{"role": "assistant", "content": other}],
    }
