"""A request's answers between the engine's thread and the event loop: submit, follow, cancel."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from functools import partial

from luthier.core.errors import UnavailableError
from luthier.data.tokens import StreamDecoder
from luthier.inference.bases import ReadyModel
from luthier.inference.echoes import Echo
from luthier.inference.engine import Engine
from luthier.inference.mail import own_mail
from luthier.inference.plans import Plan
from luthier.inference.sequence import (
    ChoiceAt,
    Failure,
    Finish,
    Piece,
    PromptScored,
    Sequence,
    SequenceEvent,
)

IndexedEvent = tuple[int, SequenceEvent]


class Generation:
    """The answers to one request, as their events arrive. Belongs to the event loop it was made on.

    Args:
        plan: prompts, and how to sample the answers to them.
    """

    def __init__(self, ready: ReadyModel, plan: Plan, *, project_id: str = "") -> None:
        self._mail = own_mail()
        self._arrived: asyncio.Queue[IndexedEvent] = asyncio.Queue()
        self._take: Callable[[IndexedEvent], None] = self._arrived.put_nowait
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
                num_virtual_tokens=ready.num_virtual_tokens,
                project_id=project_id,
                grammar=None if plan.grammar is None else plan.grammar.start(),
            )
            for index in range(plan.num_choices)
        ]

    @property
    def num_completion_tokens(self) -> int:
        """Tokens made so far, those that end an answer included."""
        return sum(sequence.num_completion_tokens for sequence in self.sequences)

    def submit(self, engine: Engine) -> None:
        """Hand the sequences to the engine; those that ask it for nothing end at once.

        Raises:
            TooManyRequestsError: when too many wait already.
            UnavailableError: when the engine is closed.
        """
        first = self.sequences[0]
        if first.options.max_tokens == 0 and not first.wants_prompt_scores:
            for index in range(len(self.sequences)):
                self._emit(index, Finish("length", 0))
            return
        engine.submit(self.sequences)

    def cancel(self) -> None:
        """Give the rows back; harmless when the answers are whole."""
        for sequence in self.sequences:
            sequence.cancel()

    def interrupt(self) -> None:
        """End the answers with an error at once, without waiting for the engine's thread."""
        self.cancel()
        error = UnavailableError("The model server is shutting down; try again.")
        self._take((0, Failure(error)))

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

        Raises:
            LuthierError: what the engine failed with.
        """
        while self._num_open:
            for found in self.read(await self.arrived()):
                yield found

    async def arrived(self) -> IndexedEvent:
        """Return the next event as it came from the engine, to be read."""
        return await self._arrived.get()

    def follow(self, take: Callable[[IndexedEvent], None]) -> None:
        """Hand over all events that `arrived` has not returned, now and as they come.

        Args:
            take: called with each, on the loop's thread; it may not raise.
        """
        while not self._arrived.empty():
            take(self._arrived.get_nowait())
        self._take = take

    def read(self, arrived: IndexedEvent) -> list[IndexedEvent]:
        """Return what an event from the engine tells of its answer.

        Returns:
            Pieces and ends, each with its choice's index.

        Raises:
            LuthierError: what the engine failed with.
        """
        index, event = arrived
        if isinstance(event, Failure):
            raise event.error
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
        # Looked up when it arrives: who takes it may have changed since it was posted.
        self._take(arrived)

    def _emit(self, index: int, event: SequenceEvent) -> None:
        try:
            self._mail.post(self._deliver, (index, event))
        except RuntimeError:
            # The loop is closed: the process is ending and nobody waits for this answer.
            self.sequences[index].cancel()


def _echo_piece(echo: Echo, event: PromptScored | Piece | Finish) -> Piece:
    if not isinstance(event, PromptScored):
        return Piece(echo.text)
    places = zip(event.choices, echo.starts, strict=True)
    return Piece(echo.text, tuple(ChoiceAt(choice, start) for choice, start in places))


def _move(piece: Piece, num_characters: int) -> Piece:
    """Return a piece whose choices count from the beginning of the echo before it."""
    moved = (replace(held, start=held.start + num_characters) for held in piece.choices)
    return piece._replace(choices=tuple(moved))
