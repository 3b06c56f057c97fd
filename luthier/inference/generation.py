"""A request's answers between the engine's thread and the event loop: plan, submit, collect, cancel."""

import asyncio
from collections.abc import AsyncIterator
from functools import partial

from luthier.core.errors import (
    ContextLengthExceededError,
    InvalidValueError,
    UnavailableError,
)
from luthier.data.tokens import StreamDecoder
from luthier.inference.bases import ReadyModel
from luthier.inference.engine import Engine
from luthier.inference.protocol import ChatRequest, CompletionRequest
from luthier.inference.sequence import Failure, Finish, SamplingOptions, Sequence, SequenceEvent

IndexedEvent = tuple[int, SequenceEvent]


def plan_chat(
    request: ChatRequest, ready: ReadyModel, *, max_tokens_default: int, max_cache_tokens: int
) -> tuple[list[list[int]], SamplingOptions]:
    """Turn a chat request into a prompt and options. Blocks for long texts; call it in a thread.

    Args:
        request: the checked request.
        ready: the model that shall answer.
        max_tokens_default: answer length in tokens when the request names none.
        max_cache_tokens: tokens of prompt and answer that the server can hold for one row.

    Returns:
        One prompt's token ids, and how to sample.

    Raises:
        ContextLengthExceededError: when prompt and answer don't fit the base's context, or the server.
        InvalidValueError: when the template refuses the messages.
    """
    messages = [message.to_message() for message in request.messages]
    prompt = ready.base.tokenizer.encode(ready.base.template.render(messages, add_generation_prompt=True))
    max_tokens = _fit(
        ready,
        [prompt],
        request.max_tokens,
        max_tokens_default,
        max_cache_tokens=max_cache_tokens,
        param="messages",
    )
    num_logprobs = (request.top_logprobs or 0) if request.logprobs else None
    return [prompt], _options(request, max_tokens, num_logprobs)


def plan_completion(
    request: CompletionRequest, ready: ReadyModel, *, max_cache_tokens: int
) -> tuple[list[list[int]], SamplingOptions]:
    """Turn a completion request into prompts and options. Blocks for long texts; call it in a thread.

    Args:
        request: the checked request.
        ready: the model that shall answer.
        max_cache_tokens: tokens of prompt and answer that the server can hold for one row.

    Returns:
        The prompts' token ids, and how to sample.

    Raises:
        ContextLengthExceededError: when a prompt and its answer don't fit the base's context, or the server.
        InvalidValueError: when a prompt is empty or names a token that the base does not have.
    """
    tokenizer = ready.base.tokenizer
    prompts = [tokenizer.encode(item) if isinstance(item, str) else item for item in request.prompt]
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise InvalidValueError("A prompt must have at least one token.", param=f"prompt.{i}")
        if not all(0 <= token_id < tokenizer.vocab_size for token_id in prompt):
            raise InvalidValueError(
                f"Token ids must be from 0 to {tokenizer.vocab_size - 1}.", param=f"prompt.{i}"
            )
    _fit(
        ready,
        prompts,
        request.max_tokens,
        request.max_tokens,
        max_cache_tokens=max_cache_tokens,
        param="prompt",
    )
    return prompts, _options(request, request.max_tokens, request.logprobs)


def _fit(
    ready: ReadyModel,
    prompts: list[list[int]],
    max_tokens: int | None,
    default: int,
    *,
    max_cache_tokens: int,
    param: str,
) -> int:
    num_virtual = ready.num_virtual_tokens
    context = ready.base.facts.context_length
    limit = min(context, max_cache_tokens) - num_virtual
    length = max(map(len, prompts))
    # An answer of unnamed length needs room for a single token only.
    wanted = 1 if max_tokens is None else max_tokens
    if length + wanted > limit:
        is_context = context <= max_cache_tokens
        whose = "This model's context is" if is_context else "This server's memory for one answer is"
        beside = f" beside the model's own {num_virtual}" if num_virtual else ""
        raise ContextLengthExceededError(
            f"{whose} {limit} tokens{beside}; the prompt has {length} and the answer was given {wanted}. "
            "Shorten the prompt or lower max_tokens.",
            param=param,
        )
    return min(default, limit - length) if max_tokens is None else max_tokens


def _options(
    request: ChatRequest | CompletionRequest, max_tokens: int, num_logprobs: int | None
) -> SamplingOptions:
    return SamplingOptions(
        max_tokens=max_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        seed=request.seed,
        num_logprobs=num_logprobs,
        stop=request.stop,
    )


class Generation:
    """The answers to one request, as their events arrive. Belongs to the event loop it was made on.

    Args:
        ready: the model that answers.
        prompts: token ids of each prompt.
        options: how to sample.
        project_id: who asks.
    """

    def __init__(
        self, ready: ReadyModel, prompts: list[list[int]], options: SamplingOptions, *, project_id: str = ""
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[IndexedEvent] = asyncio.Queue()
        self.num_prompt_tokens = sum(map(len, prompts))
        self._num_open = len(prompts)
        base = ready.base
        self.sequences = [
            Sequence(
                key=ready.served.key,
                served=ready,
                prompt_ids=prompt,
                options=options,
                decoder=StreamDecoder(base.tokenizer),
                stop_token_ids=base.tokenizer.stop_token_ids,
                emit=partial(self._emit, index),
                num_virtual_tokens=ready.num_virtual_tokens,
                project_id=project_id,
            )
            for index, prompt in enumerate(prompts)
        ]

    @property
    def num_completion_tokens(self) -> int:
        """Tokens made so far, those that end an answer included."""
        return sum(sequence.num_completion_tokens for sequence in self.sequences)

    def submit(self, engine: Engine) -> None:
        """Hand the sequences to the engine.

        Args:
            engine: the engine's thread.

        Raises:
            TooManyRequestsError: when too many wait already.
            UnavailableError: when the engine is closed.
        """
        if self.sequences[0].options.max_tokens == 0:
            for index in range(len(self.sequences)):
                self._events.put_nowait((index, Finish("length", 0)))
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
        self._events.put_nowait((0, Failure(error)))

    async def events(self) -> AsyncIterator[IndexedEvent]:
        """Follow the answers until every one is whole.

        Yields:
            Each event with its prompt's position.

        Raises:
            LuthierError: what the engine failed with.
        """
        while self._num_open:
            index, event = await self._events.get()
            if isinstance(event, Failure):
                raise event.error
            if isinstance(event, Finish):
                self._num_open -= 1
            yield index, event

    def _emit(self, index: int, event: SequenceEvent) -> None:
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))
        except RuntimeError:
            # The loop is closed: the process is ending and nobody waits for this answer.
            self.sequences[index].cancel()
