"""An answer's parts: from the engine's events to text, calls of tools and an end, whole or as they come."""

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Literal

from luthier.inference.engine.sequence import ChoiceAt, Finish, Piece, SequenceEvent
from luthier.inference.openai.generation import IndexedEvent
from luthier.inference.openai.tool_call_parser import CallArguments, CallBegun, ReadPart, ToolCallParser

EndReason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True)
class Ended:
    """A choice is whole."""

    reason: EndReason


@dataclass(frozen=True)
class Part:
    """A part of the choice at an index, and the choices of tokens that it came with."""

    index: int
    content: ReadPart | Ended
    choices: tuple[ChoiceAt, ...] = ()


@dataclass
class _Reading:
    """One choice's text so far: its parser, None without tools, and choices that are not reported yet."""

    reader: ToolCallParser | None
    choices: list[ChoiceAt] = field(default_factory=list)

    def read(self, index: int, event: Piece | Finish) -> list[Part]:
        """Return the parts that an event brings."""
        if isinstance(event, Piece):
            self.choices.extend(event.choices)
            found: list[ReadPart] = [event.text] if self.reader is None else self.reader.push(event.text)
            return self._with_choices(index, found)
        found = [] if self.reader is None else self.reader.flush()
        if self.choices and not found:
            found = [""]
        reason: EndReason = event.reason
        if self.reader is not None and self.reader.num_calls and reason == "stop":
            reason = "tool_calls"
        return [*self._with_choices(index, found), Part(index, Ended(reason))]

    def _with_choices(self, index: int, found: list[ReadPart]) -> list[Part]:
        parts = []
        for content in found:
            parts.append(Part(index, content, tuple(self.choices)))
            self.choices.clear()
        return parts


class PartReader:
    """Read the events of all choices of a generation.

    Args:
        make_reader: makes what reads one choice's text, None where that has no calls.
    """

    def __init__(self, make_reader: Callable[[], ToolCallParser | None]) -> None:
        self._make_reader = make_reader
        first = make_reader()
        self._readings = {0: _Reading(first)}
        # Whether a piece's text is a part as it is.
        self.passes_text = first is None

    def read(self, index: int, event: SequenceEvent) -> list[Part]:
        """Return the parts that an event of a choice brings; each choice's last one is an Ended."""
        assert isinstance(event, Piece | Finish)
        reading = self._readings.get(index)
        if reading is None:
            reading = self._readings[index] = _Reading(self._make_reader())
        return reading.read(index, event)


@dataclass
class Call:
    """A call of a tool; `arguments` is its JSON text."""

    id: str
    name: str
    arguments: str = ""


@dataclass
class WholeAnswer:
    """All parts of a choice."""

    text: str = ""
    calls: list[Call] = field(default_factory=list)
    choices: list[ChoiceAt] = field(default_factory=list)
    reason: EndReason = "stop"

    def add(self, part: Part) -> None:
        """Take the next part."""
        self.choices.extend(part.choices)
        content = part.content
        if isinstance(content, str):
            self.text += content
        elif isinstance(content, CallBegun):
            self.calls.append(Call(content.id, content.name))
        elif isinstance(content, CallArguments):
            self.calls[content.place].arguments += content.text
        else:
            self.reason = content.reason


async def collect(
    events: AsyncIterator[IndexedEvent], make_reader: Callable[[], ToolCallParser | None], num_choices: int
) -> list[WholeAnswer]:
    """Put the parts of all choices together.

    Args:
        events: of all choices.
        make_reader: as PartReader takes it.
    """
    reader = PartReader(make_reader)
    answers = [WholeAnswer() for _ in range(num_choices)]
    async for index, event in events:
        for part in reader.read(index, event):
            answers[part.index].add(part)
    return answers
