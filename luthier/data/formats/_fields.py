"""Rows of a few named texts, which most of the simple formats are: one reader for them all."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import msgspec

from luthier.data.formats._json_line import parse_line
from luthier.data.formats.base import Broken, Fault, Row, RowFormat, Turn, escape_text


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
        members: list[Any] = [(key, int | str if key in self._whole_numbers else str) for key in required]
        members += [(key, str | None, None) for key in optional]
        struct = msgspec.defstruct(f"{name}_row", members, forbid_unknown_fields=True)
        self._decoder: msgspec.json.Decoder[Any] = msgspec.json.Decoder(struct)
        self._spelled = [f'"{key}"'.encode() for key in self.keys]

    @abstractmethod
    def make_row(self, fields: dict[str, str]) -> Row:
        """Return the row of checked texts; an optional one that is absent is empty."""

    def accepts(self, line: bytes) -> bool:
        """Whether a line breaks no rule."""
        return self._read_fields(line) is not None

    def read(self, line: bytes) -> Row | None:
        """Return the row of a line, or None when it breaks a rule."""
        fields = self._read_fields(line)
        return None if fields is None else self.make_row(fields)

    def _read_fields(self, line: bytes) -> dict[str, str] | None:
        try:
            row = self._decoder.decode(line)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return None
        # The decoder keeps the last of two equal keys; a key that is spelled twice is looked at slowly.
        if any(line.count(key) > 1 for key in self._spelled) and isinstance(parse_line(line, 1), Fault):
            return None
        fields = {key: getattr(row, key) for key in self.keys}
        texts = {key: "" if value is None else str(value) for key, value in fields.items()}
        return texts if texts[self._learnt] else None

    def check(self, row: dict[str, Any]) -> list[Broken]:
        """Return the rules that a row breaks."""
        known = ", ".join([*self._required, *self._optional])
        broken: list[Broken] = [
            (
                escape_text(key),
                "row.unknown_key",
                f"Unknown key; a row of the format {self.name} has {known}.",
            )
            for key in row
            if key not in self.keys
        ]
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
