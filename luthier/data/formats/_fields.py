"""Rows of a few named texts, which most of the simple formats are: one reader for them all."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from luthier.data.formats.base import Broken, Row, RowFormat, Turn, check_keys


class FieldsFormat(RowFormat):
    """A format whose row is an object of texts.

    Args:
        required: keys that every row has.
        learnt: the one of them that is learnt, which may not be empty.
        optional: keys that a row may have; null counts as absent.
        whole_numbers: required keys that may hold a whole number instead of a text.
    """

    def __init__(
        self,
        name: str,
        *,
        required: Sequence[str],
        learnt: str,
        optional: Sequence[str] = (),
        whole_numbers: Sequence[str] = (),
    ) -> None:
        self.name = name
        self.signature = frozenset(required)
        self.keys = frozenset([*required, *optional])
        self._required, self._optional, self._learnt = tuple(required), tuple(optional), learnt
        self._whole_numbers = frozenset(whole_numbers)

    @abstractmethod
    def row_of(self, texts: dict[str, str]) -> Row:
        """Return the row of checked texts; an optional one that is absent is empty."""

    def make_row(self, row: dict[str, Any]) -> Row:
        return self.row_of({key: "" if row.get(key) is None else str(row[key]) for key in self.keys})

    def check(self, row: dict[str, Any]) -> list[Broken]:
        advice = f"a row of the format {self.name} has {', '.join([*self._required, *self._optional])}."
        broken = check_keys(row, self.keys, "", "row.unknown_key", advice)
        for key in (*self._required, *self._optional):
            value = row.get(key)
            is_whole = key in self._whole_numbers and isinstance(value, int) and not isinstance(value, bool)
            if value is None and key in self._optional:
                continue
            if key not in row:
                broken.append((key, "field.missing", f'"{key}" is missing; it must be a string.'))
            elif not isinstance(value, str) and not is_whole:
                what = "a string or a whole number" if key in self._whole_numbers else "a string"
                broken.append((key, "field.type", f'"{key}" must be {what}.'))
            elif key == self._learnt and value == "":
                broken.append((key, "field.empty", f'"{key}" is empty: there is nothing to learn in it.'))
        return broken


def asked_and_answered(question: str, answer: str, *, is_plain: bool = False) -> Row:
    """Return a row of a user's turn and an assistant's that is learnt."""
    turns = [Turn("user", question, None, False), Turn("assistant", answer, None, True)]
    return Row(turns, is_plain=is_plain)
