"""Turns a checked request into a generation request: prompts, options, a seed for every choice.

Blocks for long texts; the server calls it in threads. Submits nothing.
"""

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from luthier.core.errors import ContextLengthExceededError, InvalidValueError
from luthier.data.rendering.chat_template import ChatTemplate
from luthier.data.rendering.tokenizer import StreamDecoder, Tokenizer, without_splits
from luthier.inference.engine.sequence import SamplingOptions
from luthier.inference.models.base_models import LoadedBase, ReadyModel
from luthier.inference.openai.chat_request import ChatRequest, CompletionRequest, SamplingRequest
from luthier.inference.openai.grammar import COMPILE_SECONDS, CompiledGrammar, Grammars
from luthier.inference.openai.structured_output import choose_grammar
from luthier.inference.openai.tool_calls import CallSyntax, ToolCallParser, find_syntax, render_calls
from luthier.inference.openai.tools import Tool, Tools


@dataclass(frozen=True)
class PromptEcho:
    """A prompt's text; `starts` are the characters at which its tokens begin, empty unless asked for."""

    text: str
    starts: tuple[int, ...] = ()


def make_echo(tokenizer: Tokenizer, prompt: str | list[int], *, with_starts: bool) -> PromptEcho:
    """Return what an answer begins with.

    Args:
        prompt: as the client sent it, a text or its token ids.
        with_starts: whether to find out where the tokens begin.

    Returns:
        The echo; of token ids the text with all marks spelled out.
    """
    if isinstance(prompt, str):
        if not with_starts:
            return PromptEcho(prompt)
        encoding = tokenizer.add_raw_prefix(*tokenizer.encode_batch([prompt]))
        return PromptEcho(prompt, tuple(encoding.spans[:, 0].clip(0).tolist()))
    decoder = StreamDecoder(tokenizer, skip_special=False)
    pieces, starts, end = [], [], 0
    for token_id in prompt:
        starts.append(end)
        pieces.append(decoder.push(token_id))
        end += len(pieces[-1])
    text = "".join(pieces) + decoder.flush()
    return PromptEcho(text, tuple(starts) if with_starts else ())


# About 150 bytes each are held for a whole answer, and for a stream whose client does not read.
MAX_LOGPROBS = 2_000_000


@dataclass(frozen=True)
class GenerationRequest:
    """What is to be answered: choice `i` of a request is answer `i % n` to prompt `i // n`.

    `echoes` are the prompts where answers repeat them, else empty. `grammar` is what every answer must
    be, None where the text is free. `syntax` is how calls of the tools named `tool_names` are read from an
    answer, None where none can come.
    """

    prompts: list[list[int]]
    options: SamplingOptions
    n: int = 1
    echoes: tuple[PromptEcho, ...] = ()
    grammar: CompiledGrammar | None = None
    syntax: CallSyntax | None = None
    tool_names: frozenset[str] = frozenset()
    is_parallel: bool = True

    @property
    def num_choices(self) -> int:
        """How many answers there will be."""
        return self.n * len(self.prompts)

    @property
    def shown_token_ids(self) -> frozenset[int]:
        """Marks that belong to an answer's text, which readers never see otherwise."""
        return frozenset() if self.syntax is None else self.syntax.shown_token_ids

    def make_reader(self) -> ToolCallParser | None:
        """Return what reads calls from one answer; None where there can be none."""
        if self.syntax is None:
            return None
        return ToolCallParser(self.syntax, self.tool_names, is_parallel=self.is_parallel)

    def options_of(self, index: int) -> SamplingOptions:
        """Return the options of choice `index`, which has a seed of its own where one was given."""
        return replace(self.options, seed=_seed_of(self.options.seed, index % self.n))


def _seed_of(seed: int | None, place: int) -> int | None:
    """Return the seed of a prompt's answer at a place among its n; the first one's is the request's.

    A prompt's answers are then the same whatever other prompts the request has.
    """
    if seed is None or place == 0:
        return seed
    digest = hashlib.sha256(f"{seed}/{place}".encode()).digest()
    return int.from_bytes(digest[:8], signed=True)


def plan_chat(
    request: ChatRequest,
    ready: ReadyModel,
    *,
    max_tokens_default: int,
    max_cache_tokens: int,
    grammars: Grammars,
) -> GenerationRequest:
    """Turn a chat request into a generation request of one prompt.

    Args:
        max_tokens_default: answer length in tokens when the request names none.
        max_cache_tokens: tokens of prompt and answer that the server can hold for one row.

    Raises:
        ContextLengthExceededError: when prompt and answer don't fit the base's context, or the server.
        InvalidValueError: when the template refuses the messages, or a schema can't be enforced.
    """
    offered = () if request.tools is None else request.tools.offered
    _check_places(request, offered, ready.base.template)
    limit = ContextLimit(ready, max_cache_tokens, request.max_tokens, "messages")
    prompt = limit.encode(_render(request, offered, ready.base.template), ready.base.tokenizer.encode)
    num_logprobs = request.num_logprobs
    if num_logprobs is not None:
        # An answer of unnamed length is as long as its log-probabilities may be, and is never refused.
        max_tokens_default = min(max_tokens_default, MAX_LOGPROBS // (request.n * (1 + num_logprobs)))
    max_tokens = limit.answer_length(prompt, max_tokens_default)
    if num_logprobs is not None:
        param = "top_logprobs" if num_logprobs else "logprobs"
        _check_num_logprobs(request, request.n * max_tokens, num_logprobs, param)
    options = _options(request, ready, max_tokens, num_logprobs)
    planned = GenerationRequest([prompt], options, request.n)
    if request.tools is None and request.response_format is None:
        return planned
    return _with_grammar(planned, request, request.tools or Tools(), ready.base, grammars)


def _with_grammar(
    planned: GenerationRequest, request: ChatRequest, tools: Tools, base: LoadedBase, grammars: Grammars
) -> GenerationRequest:
    """Return a generation request whose answers have the form, and the calls of tools, that a chat names."""
    syntax = find_syntax(base.template, base.tokenizer) if tools.offered else None
    deadline = time.monotonic() + COMPILE_SECONDS

    def compile_grammar(lark: str, param: str) -> CompiledGrammar:
        digest = base.facts.tokenizer_digest
        return grammars.compile(lark, base.tokenizer, digest, param=param, deadline=deadline)

    return replace(
        planned,
        grammar=choose_grammar(request.response_format, tools, syntax, base.tokenizer, compile_grammar),
        syntax=syntax,
        tool_names=frozenset(tool.name for tool in tools.callable),
        is_parallel=tools.is_parallel,
    )


def _render(request: ChatRequest, tools: Sequence[Tool], template: ChatTemplate) -> str:
    messages = [message.to_message() for message in request.messages]
    definitions = [tool.definition for tool in tools]
    if any(message["content"] is None for message in messages):
        return render_calls(template, messages, definitions, add_generation_prompt=True)
    return template.render(messages, add_generation_prompt=True, tools=definitions)


def _check_places(request: ChatRequest, tools: Sequence[Tool], template: ChatTemplate) -> None:
    """Refuse what the template would leave out without a word."""
    if tools and not template.supports("tools"):
        raise InvalidValueError(
            "This model's chat template has no place for tools. Leave them out, or choose a base that was "
            "made for tools.",
            param="tools",
        )
    for i, message in enumerate(request.messages):
        if message.tool_calls and not template.supports("tool_calls"):
            raise InvalidValueError(
                "This model's chat template has no place for tool calls. Write them as content, or choose a "
                "base that was made for tools.",
                param=f"messages.{i}.tool_calls",
            )


def plan_completion(
    request: CompletionRequest, ready: ReadyModel, *, max_cache_tokens: int
) -> GenerationRequest:
    """Turn a completion request into a generation request.

    Args:
        max_cache_tokens: tokens of prompt and answer that the server can hold for one row.

    Raises:
        ContextLengthExceededError: when a prompt and its answer don't fit the base's context, or the server.
        InvalidValueError: when a prompt is empty or names a token that the base does not have.
    """
    tokenizer = ready.base.tokenizer
    limit = ContextLimit(ready, max_cache_tokens, request.max_tokens, "prompt")
    prompts = []
    for i, item in enumerate(request.prompt):
        prompt = limit.encode(item, tokenizer.encode_raw) if isinstance(item, str) else item
        if not prompt:
            raise InvalidValueError("A prompt must have at least one token.", param=f"prompt.{i}")
        if not all(0 <= token_id < tokenizer.vocab_size for token_id in prompt):
            raise InvalidValueError(
                f"Token ids must be from 0 to {tokenizer.vocab_size - 1}.", param=f"prompt.{i}"
            )
        limit.check(len(prompt))
        prompts.append(prompt)
    if request.logprobs is not None:
        num_tokens = len(prompts) * request.max_tokens + (sum(map(len, prompts)) if request.echo else 0)
        _check_num_logprobs(request, request.n * num_tokens, request.logprobs, "logprobs")
    options = _options(request, ready, request.max_tokens, request.logprobs)
    # Harnesses count on a token for each that was made, the one that ends the text included.
    options = replace(options, reports_end=request.logprobs is not None)
    if not request.echo:
        return GenerationRequest(prompts, options, request.n)
    with_starts = request.logprobs is not None
    echoes = tuple(make_echo(tokenizer, item, with_starts=with_starts) for item in request.prompt)
    return GenerationRequest(
        prompts, replace(options, num_prompt_logprobs=request.logprobs), request.n, echoes
    )


def _check_num_logprobs(request: SamplingRequest, num_tokens: int, num_top: int, param: str) -> None:
    """Refuse a whole answer with more log-probabilities than the server holds for one request.

    `num_tokens` are those of all answers, and of prompts that are scored.
    """
    count = num_tokens * (1 + num_top)
    if not request.stream and count > MAX_LOGPROBS:
        raise InvalidValueError(
            f"An answer that is not streamed may have {MAX_LOGPROBS} log-probabilities at most: for each "
            f"token of an answer, and of a prompt with echo, its own and {num_top} others. This could have "
            f"{count}. Send stream: true, or lower n, the number of prompts, max_tokens or {param}.",
            param=param,
        )


def _options(
    request: SamplingRequest, ready: ReadyModel, max_tokens: int, num_logprobs: int | None
) -> SamplingOptions:
    for token_id, _ in request.logit_bias:
        if token_id >= ready.base.tokenizer.vocab_size:
            raise InvalidValueError(
                f"Token ids must be from 0 to {ready.base.tokenizer.vocab_size - 1}.",
                param=f"logit_bias.{token_id}",
            )
    return SamplingOptions(
        max_tokens=max_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        seed=request.seed,
        num_logprobs=num_logprobs,
        stop=request.stop,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        logit_bias=request.logit_bias,
    )


@dataclass(frozen=True)
class ContextLimit:
    """ContextLimit for one prompt and its answer.

    Args:
        max_cache_tokens: tokens of prompt and answer that the server can hold for one row.
        max_tokens: of the answer, None where the request names no number.
    """

    ready: ReadyModel
    max_cache_tokens: int
    max_tokens: int | None
    param: str

    def encode(self, text: str, encode: Callable[[str], list[int]]) -> list[int]:
        """Tokenise a rendered prompt that fits.

        Args:
            text: the prompt. One that is too long to fit is refused before it is tokenised,
                which takes seconds for megabytes.
        """
        # No token without a byte: a shorter text needs no further look.
        if len(text) > self._limit and (bounds := self.ready.base.token_bounds) is not None:
            self.check(bounds.min_num_tokens(without_splits(text)), "at least ")
        token_ids = encode(text)
        self.check(len(token_ids))
        return token_ids

    def answer_length(self, token_ids: Sequence[int], default: int) -> int:
        """Return how many tokens an answer may have.

        Args:
            default: where the request names no number; less where that does not fit.
        """
        if self.max_tokens is not None:
            return self.max_tokens
        return min(default, self._limit - len(token_ids))

    @cached_property
    def _limit(self) -> int:
        context = self.ready.base.facts.context_length
        return min(context, self.max_cache_tokens) - self.ready.num_virtual_tokens

    def check(self, length: int, how: str = "") -> None:
        """Refuse a prompt that does not fit."""
        # An answer of unnamed length needs room for a single token only.
        wanted = 1 if self.max_tokens is None else self.max_tokens
        if length + wanted <= self._limit:
            return
        num_virtual = self.ready.num_virtual_tokens
        is_context = self.ready.base.facts.context_length <= self.max_cache_tokens
        whose = "This model's context is" if is_context else "This server's memory for one answer is"
        beside = f" beside the model's own {num_virtual}" if num_virtual else ""
        # A smaller answer helps only a prompt that fits by itself.
        is_prompt = length + 1 > self._limit
        answer = "" if is_prompt else f" and the answer was given {wanted}"
        advice = "Shorten the prompt" if is_prompt else "Shorten the prompt or lower max_tokens"
        raise ContextLengthExceededError(
            f"{whose} {self._limit} tokens{beside}; the prompt has {how}{length}{answer}. {advice}.",
            param=self.param,
        )
