"""One answer in the making: its prompt, its options, its text so far. No tensors, no HTTP."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from luthier.core.errors import LuthierError


class StopMatcher:
    """Let text through until one of the stop texts appears.

    Text that could be the beginning of a stop text is held back until it is decided. No stop text is empty.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        # Characters let through so far.
        self.num_released = 0
        self.is_hit = False

    def push(self, text: str) -> str:
        """Add text and return what is certain to be part of the answer."""
        buffer = self._held + text
        positions = [at for at in (buffer.find(stop) for stop in self._stops) if at >= 0]
        if positions:
            self.is_hit = True
            return self._release(buffer, min(positions), keep=False)
        return self._release(buffer, len(buffer) - self._num_undecided(buffer), keep=True)

    def flush(self) -> str:
        """Return what was held back; to be called when no more text can come."""
        return self._release(self._held, len(self._held), keep=False)

    def _release(self, buffer: str, length: int, *, keep: bool) -> str:
        self._held = buffer[length:] if keep else ""
        self.num_released += length
        return buffer[:length]

    def _num_undecided(self, buffer: str) -> int:
        longest = min(len(buffer), max((len(stop) for stop in self._stops), default=1) - 1)
        ends = (n for n in range(longest, 0, -1) if any(s.startswith(buffer[-n:]) for s in self._stops))
        return next(ends, 0)


FinishReason = Literal["stop", "length"]
# Which weights answer: a base's id and an artifact's digest, None for the bare base.
ModelKey = tuple[str, str | None]


class TextDecoder(Protocol):
    """What luthier.data.rendering.tokenizer.StreamDecoder promises."""

    def push(self, token_id: int) -> str:
        """Add a token and return the text that is complete."""

    def flush(self) -> str:
        """Return what is left."""


class Grammar(Protocol):
    """What an answer's text must be, token by token; luthier.inference.openai.grammar makes it."""

    @property
    def is_finished(self) -> bool:
        """Whether the text is whole and nothing may follow."""

    def allows(self, token_id: int) -> bool:
        """Whether a token may come next."""

    def mask(self) -> npt.NDArray[np.bool_]:
        """Return which tokens may come next, bool [V]."""

    def push(self, token_id: int) -> None:
        """Take the token that came, which must be one that is allowed."""


@dataclass(frozen=True)
class SamplingOptions:
    """How the next token is chosen and when to end.

    `num_logprobs` is the number of alternatives to report per token, 0 for the chosen token's own
    log-probability alone, None for none at all; `num_prompt_logprobs` is the same of the prompt's tokens.
    With `reports_end` the token that ends an answer is reported too. The penalties and `logit_bias` (token
    ids and what is added to their logits) are OpenAI's.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None
    reports_end: bool = False
    stop: tuple[str, ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()


class Choice(NamedTuple):
    """A chosen token; log-probabilities (nats) are those of the model before temperature and top_p."""

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class ChoiceAt:
    """A choice and the character of the answer at which its text begins."""

    choice: Choice
    start: int


@dataclass(frozen=True)
class PromptScored:
    """The prompt's tokens as if they had been chosen; the first has no log-probability."""

    choices: tuple[Choice, ...]


class Piece(NamedTuple):
    """New text of the answer, and the choices that were made for it when they were asked for."""

    text: str
    choices: tuple[ChoiceAt, ...] = ()


@dataclass(frozen=True)
class Finish:
    """The answer is whole."""

    reason: FinishReason
    num_completion_tokens: int


@dataclass(frozen=True)
class Failure:
    """There will be no more of this answer."""

    error: LuthierError


SequenceEvent = PromptScored | Piece | Finish | Failure


@dataclass(eq=False)
class Sequence:
    """A request's answer while it is made.

    Args:
        key: which weights answer; sequences of one key may share a batch.
        prompt_ids: at least one.
        stop_token_ids: tokens that end an answer and have no text.
        emit: takes each event; called on the engine's thread.
        project_id: for fairness between projects.
        grammar: what the text must be, None where it is free; this sequence's own.
    """

    key: ModelKey
    served: Any
    prompt_ids: list[int]
    options: SamplingOptions
    decoder: TextDecoder
    stop_token_ids: frozenset[int]
    emit: Callable[[SequenceEvent], None]
    project_id: str = ""
    grammar: Grammar | None = None
    num_completion_tokens: int = 0
    # By the monotonic clock, in seconds: for measures alone.
    made_at: float = field(default_factory=time.monotonic)
    last_token_at: float = 0.0
    is_finished: bool = False
    is_cancelled: bool = False
    # The sampler's own, made at the first token: a generator, and `logit_bias` as tensors.
    generator: Any = None
    bias: Any = None
    # All its tokens so far, while it waits after a preemption.
    interrupted_tokens: list[int] | None = None
    # How often each token came, where penalties ask for it.
    token_counts: dict[int, int] = field(default_factory=dict)
    _prompt_choices: list[Choice] = field(default_factory=list)
    _is_prompt_scored: bool = False
    _num_decoded: int = 0
    _held_choices: list[ChoiceAt] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._stops = StopMatcher(self.options.stop)
        # Read at every step. Plainly: the model's own logits decide, and nothing but a token is asked for.
        options = self.options
        self._has_penalties = options.presence_penalty != 0.0 or options.frequency_penalty != 0.0
        is_changed = bool(options.logit_bias) or self._has_penalties or self.grammar is not None
        is_plain = options.num_logprobs is None and not is_changed
        self.is_plainly_greedy = is_plain and options.temperature == 0.0
        self.is_plainly_drawn = is_plain and options.temperature > 0.0

    @property
    def is_done(self) -> bool:
        """Whether no further token is wanted."""
        return self.is_finished or self.is_cancelled

    @property
    def wants_prompt_scores(self) -> bool:
        """Whether the log-probabilities of the prompt's tokens are still missing."""
        return self.options.num_prompt_logprobs is not None and not self._is_prompt_scored

    def cancel(self) -> None:
        """Ask for no more tokens; safe from any thread, honoured at the next step."""
        self.is_cancelled = True

    def fail(self, error: LuthierError) -> None:
        """End without an answer, or in the middle of one."""
        if not self.is_finished:
            self.is_finished = True
            self.emit(Failure(error))

    def take_prompt_choices(self, first: int, choices: list[Choice]) -> None:
        """Take the scores of a chunk of the prompt, from 0 again after a preemption; emit all at its end."""
        if self.is_finished:
            return
        del self._prompt_choices[first:]
        self._prompt_choices.extend(choices)
        if len(self._prompt_choices) < len(self.prompt_ids):
            return
        self._is_prompt_scored = True
        self.emit(PromptScored(tuple(self._prompt_choices)))
        self._prompt_choices.clear()
        if self.options.max_tokens == 0:
            self._finish("length", "")

    def accept(self, choice: Choice) -> None:
        """Add a token to the answer and emit what became certain by it; nothing after a failure."""
        if self.is_finished:
            return
        self.num_completion_tokens += 1
        if choice.token_id in self.stop_token_ids:
            text = self._push_text(self.decoder.flush())
            if self.options.reports_end:
                self._held_choices.append(ChoiceAt(choice, self._num_decoded))
            self._finish("stop", text)
            return
        if self.grammar is not None:
            try:
                self.grammar.push(choice.token_id)
            except LuthierError as error:
                self.fail(error)
                return
        if self._has_penalties:
            self.token_counts[choice.token_id] = self.token_counts.get(choice.token_id, 0) + 1
        if self.options.num_logprobs is not None:
            self._held_choices.append(ChoiceAt(choice, self._num_decoded))
        text = self._push_text(self.decoder.push(choice.token_id))
        if self._stops.is_hit:
            self._finish("stop", text)
        elif self.grammar is not None and self.grammar.is_finished:
            self._finish("stop", text + self._push_text(self.decoder.flush()))
        elif self.num_completion_tokens >= self.options.max_tokens:
            text += self._push_text(self.decoder.flush())
            self._finish("stop" if self._stops.is_hit else "length", text)
        elif text:
            self._emit_piece(text)

    def _push_text(self, text: str) -> str:
        self._num_decoded += len(text)
        return self._stops.push(text) if self.options.stop else text

    def _emit_piece(self, text: str) -> None:
        choices: tuple[ChoiceAt, ...] = ()
        if self._held_choices:
            choices = tuple(self._held_choices)
            self._held_choices.clear()
        self.emit(Piece(text, choices))

    def _finish(self, reason: FinishReason, text: str) -> None:
        text += self._stops.flush()
        if self._stops.is_hit:
            # Tokens within the stop text are no part of the answer.
            end = self._stops.num_released
            self._held_choices = [held for held in self._held_choices if held.start < end]
        if text or self._held_choices:
            self._emit_piece(text)
        self.is_finished = True
        self.emit(Finish(reason, self.num_completion_tokens))
