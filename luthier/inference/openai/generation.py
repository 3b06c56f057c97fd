"""A request's answers between the engine's thread and the event loop: submit, follow, cancel."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial

from luthier.core.errors import UnavailableError
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

IndexedEvent = tuple[int, SequenceEvent]


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
    def num_completion_tokens(self) -> int:
        """Tokens made so far, those that end an answer included."""
        return sum(sequence.num_completion_tokens for sequence in self.sequences)

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
    def has_echoes(self) -> bool:
        """Whether answers begin with their prompts."""
        return bool(self._echoes)

    @property
    def is_open(self) -> bool:
        """Whether any of the answers that were read is not whole."""
        return self._num_open > 0

    async def events(self) -> AsyncIterator[IndexedEvent]:
        """Follow the answers until every one is whole.

        Yields:
            Each event with its choice's index.
        """
        while self._num_open:
            for found in await self.next_events():
                yield found

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
            found += self._read(index, event)
        return found

    def _read(self, index: int, event: PromptScored | Piece | Finish) -> list[IndexedEvent]:
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
