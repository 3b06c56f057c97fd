"""What a row format is: one file of this folder, with an object named FORMAT that keeps the promise below.

A fault names its line, its place and its rule; it never quotes more than 40 escaped characters of a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

_MAX_QUOTED_CHARS = 40
_NUM_TOLD = 5


@dataclass(frozen=True, slots=True)
class Fault:
    """One broken rule.

    `line` and `column` count from 1; `column` is in characters, None where a field says it better. `field`
    is a path such as `messages[2].weight`, None where the whole line is meant. `rule` is a stable name.
    """

    line: int
    column: int | None
    field: str | None
    rule: str
    message: str

    def __str__(self) -> str:
        place = f"Line {self.line}"
        if self.column is not None:
            place += f", column {self.column}"
        if self.field is not None:
            place += f", {self.field}"
        return f"{place}: {self.message}"


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation, its parts joined. `is_trained` is True on assistant turns alone."""

    role: str
    content: str
    name: str | None
    is_trained: bool

    def to_message(self) -> dict[str, str]:
        """Return the turn as a message of a chat template."""
        message = {"role": self.role, "content": self.content}
        return message if self.name is None else message | {"name": self.name}


class RowFormat(Protocol):
    """A way to write one training row as one line."""

    name: str

    def read(self, line: bytes) -> list[Turn] | None:
        """Read a line fast.

        Args:
            line: without its line end.

        Returns:
            The turns, or None when the line breaks a rule.
        """

    def explain(self, line: bytes, number: int) -> list[Fault]:
        """Say slowly and exactly what is wrong with a line that `read` refused.

        Args:
            line: without its line end.
            number: of the line, from 1.

        Returns:
            At least one fault.
        """


def escape_text(text: str) -> str:
    """Return the beginning of a user's text, escaped, in at most 40 characters."""
    return text[:_MAX_QUOTED_CHARS].encode("unicode_escape").decode()[:_MAX_QUOTED_CHARS]


def tell_faults(faults: Sequence[Fault]) -> str:
    """Return the first few faults as sentences, a line each, and how many more there are."""
    told = [str(fault) for fault in faults[:_NUM_TOLD]]
    num_more = len(faults) - len(told)
    return "\n".join([*told, f"And {num_more} more."] if num_more else told)
