"""Sequences for tests of the engine; their tokens can be read back from their text."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from luthier.inference.engine.sequence import Choice, Piece, SamplingOptions, Sequence, SequenceEvent
from luthier.inference.engine.step import BatchExecutor
from luthier.modeling.protocols import AdapterInfo

_FIRST = 0x4E00


class TokenDecoder:
    """Decodes every token into one character."""

    def push(self, token_id: int) -> str:
        return chr(_FIRST + token_id)

    def flush(self) -> str:
        return ""


def text_of(token_ids: Iterable[int]) -> str:
    """Return the text of tokens, as `TokenDecoder` decodes them."""
    return "".join(map(TokenDecoder().push, token_ids))


@dataclass
class Asked:
    """A sequence, what it emitted, and the tokens that it must answer."""

    sequence: Sequence
    events: list[SequenceEvent]
    expected: list[int] = field(default_factory=list)

    @property
    def token_ids(self) -> list[int]:
        texts = (event.text for event in self.events if isinstance(event, Piece))
        return [ord(character) - _FIRST for text in texts for character in text]

    @property
    def choices(self) -> list[Choice]:
        return [one.choice for event in self.events if isinstance(event, Piece) for one in event.choices]


def ask(
    prompt_ids: list[int],
    max_tokens: int = 100,
    *,
    executor: BatchExecutor | None = None,
    adapter: AdapterInfo | None = None,
    model: str | None = None,
    stop_token_ids: Iterable[int] = (),
    project_id: str = "",
    grammar: Any = None,
    **options: Any,
) -> Asked:
    """Make a sequence that takes the likeliest tokens unless `options` of sampling say otherwise."""
    events: list[SequenceEvent] = []
    sequence = Sequence(
        key=("base", model or (None if adapter is None else str(adapter.adapter))),
        served=SimpleNamespace(executor=executor, adapter=adapter),
        prompt_ids=prompt_ids,
        options=SamplingOptions(**{"max_tokens": max_tokens, "temperature": 0.0} | options),
        decoder=TokenDecoder(),
        stop_token_ids=frozenset(stop_token_ids),
        emit=events.append,
        project_id=project_id,
        grammar=grammar,
    )
    return Asked(sequence, events)


def run(executor: BatchExecutor, *asked: Asked) -> None:
    """Add sequences, and run an executor until it has nothing left to do."""
    for one in asked:
        executor.scheduler.add(one.sequence)
    for _ in range(2000):
        if not executor.scheduler.has_work:
            return
        executor.step()
    raise AssertionError("the executor never ends")
