"""An answer on its way out as server-sent events, to its own response or to a channel."""

import asyncio
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

from luthier.core.errors import LuthierError
from luthier.inference.answers import Shape, Usage
from luthier.inference.call_reader import CallReader
from luthier.inference.faults import log_fault, to_told
from luthier.inference.generation import Generation, IndexedEvent
from luthier.inference.parts import Part, PartReader
from luthier.inference.sequence import Piece

_LOG = logging.getLogger(__name__)


class Outlet(Protocol):
    """What a stream is written to; what can't be sent ends it, and raises nothing."""

    def write(self, content: bytes) -> None:
        """Send a piece of the stream; an empty one is none."""

    def end(self) -> None:
        """Send the stream's end."""

    def ending(self) -> AbstractContextManager[asyncio.Event]:
        """Hold what says that the stream has no more to send, or nobody to send to."""


class StreamedAnswer:
    """The answers to one request, from the engine's events to bytes.

    Args:
        make_reader: as PartReader takes it.
    """

    def __init__(
        self, shape: Shape, generation: Generation, make_reader: Callable[[], CallReader | None]
    ) -> None:
        self._shape = shape
        self._generation = generation
        self._reader = PartReader(make_reader)
        self._passes_text = self._reader.passes_text and not generation.has_echoes
        self._is_over = False

    async def start(self) -> bytes:
        """Wait for the first part.

        Returns:
            The events up to it.

        Raises:
            LuthierError: what the engine failed with before.
        """
        parts: list[Part] = []
        while not parts:
            parts = self._read_parts(await self._generation.arrived())
        return b"".join(self._shape.first_events(len(self._generation.sequences))) + self._encode(parts)

    async def send(self, begun: bytes, outlet: Outlet) -> None:
        """Send the answers, until they are whole or nobody reads them any more; a failure as the last event.

        Each event is sent in the turn of the loop in which it arrives, without a task that would have to be
        woken for it.

        Args:
            begun: what `start` returned.
            outlet: where to.
        """
        with outlet.ending() as end:

            def take(arrived: IndexedEvent) -> None:
                # What comes after a failure, or when the client has left, is for nobody.
                if end.is_set():
                    return
                try:
                    outlet.write(self._read(arrived))
                except Exception as error:  # noqa: BLE001 - others' events are delivered in the same turn
                    # Not even a failure could be told.
                    log_fault(_LOG, "A stream", error)
                    self._is_over = True
                end_if_over()

            def end_if_over() -> None:
                if self._is_over:
                    outlet.end()
                    end.set()

            outlet.write(begun)
            end_if_over()
            self._generation.follow(take)
            try:
                await end.wait()
            finally:
                end.set()

    def _read(self, arrived: IndexedEvent) -> bytes:
        index, event = arrived
        try:
            if self._passes_text and isinstance(event, Piece) and not event.choices:
                # Nearly every event is one: all that others need takes several times as long.
                return self._shape.text_event(index, event.text)
            return self._encode(self._read_parts(arrived))
        except LuthierError as error:
            return self._fail(error)
        except Exception as error:  # noqa: BLE001 - its client is told, and nobody else's stream ends
            return self._fail(to_told(_LOG, "A stream", error))

    def _fail(self, error: LuthierError) -> bytes:
        self._is_over = True
        return b"".join(self._shape.error_events(error))

    def _read_parts(self, arrived: IndexedEvent) -> list[Part]:
        found = self._generation.read(arrived)
        return [part for index, event in found for part in self._reader.read(index, event)]

    def _encode(self, parts: list[Part]) -> bytes:
        events = [event for part in parts for event in self._shape.part_events(part)]
        if not self._generation.is_open:
            self._is_over = True
            events += self._shape.last_events(usage_of(self._generation))
        return b"".join(events)


def usage_of(generation: Generation) -> Usage:
    """Return the tokens of a generation so far."""
    return Usage(generation.num_prompt_tokens, generation.num_completion_tokens)
