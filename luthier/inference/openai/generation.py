"""A request's answers between the engine's thread and the event loop: submit, follow, read, cancel.

The engine's events become parts: text, calls of tools and an end, as they arrive or all together.
"""

import asyncio
from collections import deque
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

from luthier.core.errors import UnavailableError
from luthier.core.inference import TokenUsage
from luthier.data.rendering.tokenizer import StreamDecoder
from luthier.inference.engine.engine import Engine
from luthier.inference.engine.sequence import (
    ChoiceAt,
    Failure,
    Finish,
    Piece,
    PromptScored,
    Sequence,
    SequenceEvent,
)
from luthier.inference.models.base_models import ReadyModel
from luthier.inference.openai.generation_request import MAX_LOGPROBS, GenerationRequest, PromptEcho
from luthier.inference.openai.tool_calls import CallArguments, CallBegun, ReadPart, ToolCallParser

IndexedEvent = tuple[int, SequenceEvent]
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


class Generation:
    """The answers to one request, as their events arrive. Belongs to the event loop it was made on.

    Args:
        plan: prompts, and how to sample the answers to them.
    """

    def __init__(
        self, engine: Engine, ready: ReadyModel, plan: GenerationRequest, *, project_id: str = ""
    ) -> None:
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._arrived: deque[IndexedEvent] = deque()
        self._has_arrived = asyncio.Event()
        self._num_unread = 0
        self._is_abandoned = False
        self.num_prompt_tokens = sum(map(len, plan.prompts))
        self._num_open = plan.num_choices
        self._echoes = {
            index: plan.echoes[index // plan.n] for index in range(plan.num_choices) if plan.echoes
        }
        self._is_echoed: set[int] = set()
        # Whether a piece's text is a part as it is.
        self.passes_text = plan.syntax is None and not plan.echoes
        self._readings = [_Reading(plan.make_reader()) for _ in range(plan.num_choices)]
        base = ready.base
        self.sequences = [
            Sequence(
                key=ready.served.key,
                served=ready,
                prompt_ids=plan.prompts[index // plan.n],
                options=plan.options_of(index),
                decoder=StreamDecoder(base.tokenizer, shown=plan.shown_token_ids),
                stop_token_ids=base.tokenizer.stop_token_ids,
                emit=partial(self._emit, index),
                project_id=project_id,
                grammar=None if plan.grammar is None else plan.grammar.start(),
            )
            for index in range(plan.num_choices)
        ]

    @property
    def usage(self) -> TokenUsage:
        """Tokens of the prompts, and of the answers so far, those that end one included."""
        num_tokens = sum(sequence.num_completion_tokens for sequence in self.sequences)
        return TokenUsage(self.num_prompt_tokens, 0, num_tokens)

    def submit(self) -> None:
        """Hand the sequences to the engine; those that ask it for nothing end at once.

        Raises:
            TooManyRequestsError: when too many wait already.
            UnavailableError: when the engine is closed.
        """
        first = self.sequences[0]
        if first.options.max_tokens == 0 and not first.wants_prompt_scores:
            for index in range(len(self.sequences)):
                self._deliver((index, Finish("length", 0)))
            return
        self._engine.submit(self.sequences)

    def cancel(self) -> None:
        """Give the rows back; harmless when the answers are whole."""
        for sequence in self.sequences:
            sequence.cancel()

    def interrupt(self) -> None:
        """End the answers with an error at once, without waiting for the engine's thread."""
        self.cancel()
        error = UnavailableError("The model server is shutting down; try again.")
        self._deliver((0, Failure(error)))

    @property
    def is_open(self) -> bool:
        """Whether any of the answers that were read is not whole."""
        return self._num_open > 0

    async def collect(self) -> list[WholeAnswer]:
        """Wait until every answer is whole, and return them."""
        answers = [WholeAnswer() for _ in self.sequences]
        while self._num_open:
            for index, event in await self.next_events():
                for part in self.read(index, event):
                    answers[index].add(part)
        return answers

    def read(self, index: int, event: SequenceEvent) -> list[Part]:
        """Return the parts that an event of a choice brings; each choice's last one is an Ended."""
        assert isinstance(event, Piece | Finish)
        return self._readings[index].read(index, event)

    async def next_events(self) -> list[IndexedEvent]:
        """Wait for events and return all that have arrived: pieces and ends, each with its choice's index.

        Raises:
            LuthierError: what the engine failed with, once what came before has been returned.
        """
        while not self._arrived:
            self._has_arrived.clear()
            await self._has_arrived.wait()
        found: list[IndexedEvent] = []
        while self._arrived:
            index, event = self._arrived[0]
            if isinstance(event, Failure):
                if found:
                    break
                raise event.error
            self._arrived.popleft()
            self._num_unread -= _weigh(event)
            found += self._with_echo(index, event)
        return found

    def _with_echo(self, index: int, event: PromptScored | Piece | Finish) -> list[IndexedEvent]:
        found: list[IndexedEvent] = []
        echo = self._echoes.get(index)
        if echo is not None and index not in self._is_echoed:
            self._is_echoed.add(index)
            found.append((index, _echo_piece(echo, event)))
        if isinstance(event, PromptScored):
            return found
        if isinstance(event, Finish):
            self._num_open -= 1
        elif echo is not None and event.choices:
            event = _move(event, len(echo.text))
        return [*found, (index, event)]

    def _deliver(self, arrived: IndexedEvent) -> None:
        if self._is_abandoned:
            return
        self._num_unread += _weigh(arrived[1])
        if self._num_unread > MAX_LOGPROBS:
            # The client of a stream does not read: what it has not read is in memory, and grows.
            self._is_abandoned = True
            self.cancel()
            self._arrived.clear()
            error = UnavailableError("The stream was read too slowly; ask for less at once, or read faster.")
            arrived = (arrived[0], Failure(error))
        self._arrived.append(arrived)
        self._has_arrived.set()

    def _emit(self, index: int, event: SequenceEvent) -> None:
        self._engine.events.add(self._loop, self._deliver, (index, event))


def _weigh(event: SequenceEvent) -> int:
    """Return what an event counts as in memory: itself, and its log-probabilities."""
    if isinstance(event, PromptScored):
        # The first has none, and the others have the same number each.
        return 1 + len(event.choices) * (1 + len(event.choices[-1].top))
    if isinstance(event, Piece) and event.choices:
        return 1 + len(event.choices) * (1 + len(event.choices[-1].choice.top))
    return 1


def _echo_piece(echo: PromptEcho, event: PromptScored | Piece | Finish) -> Piece:
    if not isinstance(event, PromptScored):
        return Piece(echo.text)
    places = zip(event.choices, echo.starts, strict=True)
    return Piece(echo.text, tuple(ChoiceAt(choice, start) for choice, start in places))


def _move(piece: Piece, num_characters: int) -> Piece:
    """Return a piece whose choices count from the beginning of the echo before it."""
    moved = (replace(held, start=held.start + num_characters) for held in piece.choices)
    return piece._replace(choices=tuple(moved))
