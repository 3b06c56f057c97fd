"""An answer as server-sent events."""

import logging
from collections.abc import AsyncIterator, Callable

from luthier.inference.engine.error_reporting import to_told
from luthier.inference.engine.sequence import Piece
from luthier.inference.openai.chat_response import Shape, Usage, token_usage
from luthier.inference.openai.generation import Generation, IndexedEvent
from luthier.inference.openai.output_parser import PartReader
from luthier.inference.openai.tool_call_parser import CallReader

_LOG = logging.getLogger(__name__)


class StreamedAnswer:
    """The answers to one request, from the engine's events to bytes.

    Args:
        make_reader: as PartReader takes it.
        reports_usage: whether an event of the usage goes before the last ones.
    """

    def __init__(
        self,
        shape: Shape,
        generation: Generation,
        make_reader: Callable[[], CallReader | None],
        *,
        reports_usage: bool = False,
    ) -> None:
        self._reports_usage = reports_usage
        self._shape = shape
        self._generation = generation
        self._reader = PartReader(make_reader)
        self._passes_text = self._reader.passes_text and not generation.has_echoes

    async def start(self) -> bytes:
        """Wait for the first part and return the events up to it.

        Raises:
            LuthierError: what the engine failed with before.
        """
        first = self._shape.first_events(len(self._generation.sequences))
        events: list[bytes] = []
        while not events:
            events = self._encode(await self._generation.next_events())
        return b"".join(first + events)

    async def pieces(self, begun: bytes) -> AsyncIterator[bytes]:
        """Yield the events, those that arrive together in one piece; a failure as the last ones.

        Args:
            begun: what `start` returned.
        """
        yield begun
        try:
            while self._generation.is_open:
                events = self._encode(await self._generation.next_events())
                if events:
                    yield b"".join(events)
        except Exception as error:  # noqa: BLE001 - the client gets an error event, whatever failed
            yield b"".join(self._shape.error_events(to_told(_LOG, "A stream", error)))

    def _encode(self, arrived: list[IndexedEvent]) -> list[bytes]:
        events: list[bytes] = []
        for index, event in arrived:
            if self._passes_text and isinstance(event, Piece) and not event.choices:
                # Nearly every event is one: all that others need takes several times as long.
                events.append(self._shape.text_event(index, event.text))
                continue
            for part in self._reader.read(index, event):
                events += self._shape.part_events(part)
        if not self._generation.is_open:
            counted = usage_of(self._generation)
            if self._reports_usage:
                events.append(token_usage(counted).to_event())
            events += self._shape.last_events(counted)
        return events


def usage_of(generation: Generation) -> Usage:
    """Return the tokens of a generation so far."""
    return Usage(generation.num_prompt_tokens, generation.num_completion_tokens)
