"""The HTTP face of the engine: OpenAI's three endpoints and the server's status, as a plain Starlette app.

Only the API talks to it. Errors leave in OpenAI's shape; after the first byte as a stream event.
"""

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from luthier.core.errors import InvalidRequestError, LuthierError
from luthier.core.ids import new_id
from luthier.core.inference import (
    HEADER_DIGEST,
    HEADER_USAGE,
    LOANS_PATH,
    LoanRequest,
    MemoryLoan,
    ModelTarget,
    TokenUsage,
)
from luthier.core.runtime import now_seconds
from luthier.core.settings import Settings
from luthier.inference.engine.engine import Engine
from luthier.inference.engine.error_reporting import to_client_error
from luthier.inference.engine.sequence import Piece
from luthier.inference.models.base_models import ReadyModel, find_serving_device
from luthier.inference.models.registry import Models, read_target
from luthier.inference.openai.chat_request import ChatRequest, parse_chat, parse_completion
from luthier.inference.openai.chat_response import (
    ChatFormatter,
    CompletionFormatter,
    ResponseFormatter,
    Usage,
    token_usage,
)
from luthier.inference.openai.generation import Generation, IndexedEvent
from luthier.inference.openai.generation_request import GenerationRequest, plan_chat, plan_completion
from luthier.inference.openai.grammar import Grammars
from luthier.inference.openai.output_parser import PartReader, collect
from luthier.inference.openai.responses_request import parse_response
from luthier.inference.openai.responses_response import ResponsesFormatter
from luthier.inference.openai.tool_call_parser import ToolCallParser
from luthier.inference.server.http import (
    EXCEPTION_HANDLERS,
    FaultGate,
    TokenGate,
    json_response,
    read_body,
)
from luthier.inference.server.sse import EventStream, while_connected
from luthier.inference.server.status import Status

_LOG = logging.getLogger(__name__)

# Seconds between checks for models in memory, or on this disk, that were deleted.
DELETED_CHECK_SECONDS = 60.0
# Choices whose log-probabilities are formatted on the event loop, in a few milliseconds.
_MAX_CHOICES_AT_ONCE = 1000
# A body of this length is parsed in a millisecond or two.
_MAX_BYTES_ON_LOOP = 64 * 1024
# Grammars of schemas have threads of their own, beside those that load models.
_NUM_COMPILERS = 2
# Few, so that the memory of large bodies is that of two.
_NUM_PARSERS = 2

AskedT = TypeVar("AskedT")


@dataclass(frozen=True)
class _Asking:
    """A checked request and what its answer is made from."""

    request: Request
    target: ModelTarget
    ready: ReadyModel
    shape: ResponseFormatter
    planning: Coroutine[Any, Any, GenerationRequest]
    is_stream: bool


class Service:
    """The endpoints, over the models and the engine.

    Args:
        on_first_base: as Models takes it.
    """

    def __init__(
        self, settings: Settings, engine: Engine, on_first_base: Callable[[], None] | None = None
    ) -> None:
        self._settings = settings
        self._engine = engine
        self._open: set[Generation] = set()
        self._grammars = Grammars()
        self._compilers = FairExecutor(_NUM_COMPILERS, "compile")
        self._parsers = ThreadPoolExecutor(_NUM_PARSERS, "parse")
        self.models = Models(settings, engine, on_first_base)
        self.status = Status(settings, engine, self.models)
        self._device = find_serving_device(settings)

    async def chat(self, request: Request) -> Response:
        """Answer POST /v1/chat/completions."""
        target = read_target(request.headers)
        asked = await self._read(request, parse_chat)
        with contextlib.ExitStack() as stack:
            ready = await self._hold(request, target, stack)
            shape = ChatFormatter(
                id=new_id("chat_completion"),
                created=now_seconds(),
                model=target.model,
                fingerprint=ready.served.fingerprint,
                tokenizer=ready.base.tokenizer,
                with_logprobs=asked.logprobs,
                with_usage=asked.stream_options.include_usage,
                with_content=asked.tools.mode != "required",
            )
            planning = self._plan_chat(asked, ready, target.project_id)
            asking = _Asking(request, target, ready, shape, planning, is_stream=asked.stream)
            return await self._answer(asking, stack)

    async def response(self, request: Request) -> Response:
        """Answer POST /v1/responses."""
        target = read_target(request.headers)
        asked = await self._read(request, parse_response)
        with contextlib.ExitStack() as stack:
            ready = await self._hold(request, target, stack)
            shape = ResponsesFormatter(
                now_seconds(),
                target.model,
                asked.echo,
                ready.base.tokenizer,
                with_logprobs=asked.chat.logprobs,
            )
            planning = self._plan_response(asked.chat, ready, target.project_id)
            asking = _Asking(request, target, ready, shape, planning, is_stream=asked.chat.stream)
            return await self._answer(asking, stack)

    async def _plan_chat(self, asked: ChatRequest, ready: ReadyModel, project_id: str) -> GenerationRequest:
        plan = partial(
            plan_chat,
            asked,
            ready,
            max_tokens_default=self._settings.max_tokens_default,
            max_cache_tokens=self._settings.max_cache_tokens,
            grammars=self._grammars,
        )
        if asked.has_schema:
            return await self._compilers.run(project_id, plan)
        return await asyncio.to_thread(plan)

    async def _plan_response(
        self, asked: ChatRequest, ready: ReadyModel, project_id: str
    ) -> GenerationRequest:
        try:
            return await self._plan_chat(asked, ready, project_id)
        except LuthierError as error:
            if (error.param or "").startswith("messages"):
                error.param = "input"
            raise

    async def completion(self, request: Request) -> Response:
        """Answer POST /v1/completions."""
        target = read_target(request.headers)
        asked = await self._read(request, parse_completion)
        with contextlib.ExitStack() as stack:
            ready = await self._hold(request, target, stack)
            shape = CompletionFormatter(
                id=new_id("completion"),
                created=now_seconds(),
                model=target.model,
                fingerprint=ready.served.fingerprint,
                tokenizer=ready.base.tokenizer,
                with_logprobs=asked.logprobs is not None,
                with_usage=asked.stream_options.include_usage,
            )
            planning = asyncio.to_thread(
                plan_completion, asked, ready, max_cache_tokens=self._settings.max_cache_tokens
            )
            asking = _Asking(request, target, ready, shape, planning, is_stream=asked.stream)
            return await self._answer(asking, stack)

    async def lend(self, request: Request) -> Response:
        """Answer POST /internal/loans: lend idle pages to a job on the same device, or take them back."""
        try:
            asked = LoanRequest.model_validate_json(await read_body(request))
        except ValidationError as error:
            raise InvalidRequestError("The body is no request for a loan.") from error
        is_here = asked.hostname in (None, self._device.hostname) and asked.device == self._device.name
        lent_bytes = await self.models.lend(asked) if is_here else 0
        return json_response(MemoryLoan(lent_bytes=lent_bytes).model_dump())

    def interrupt(self) -> None:
        """End every open answer with an error; the process is going to stop."""
        self._engine.close()
        for generation in list(self._open):
            generation.interrupt()

    async def _read(self, request: Request, parse: Callable[[bytes], AskedT]) -> AskedT:
        """Return the checked request; a large one is parsed in a thread, beside the streams."""
        body = await read_body(request)
        if len(body) <= _MAX_BYTES_ON_LOOP:
            return parse(body)
        parsing = asyncio.get_running_loop().run_in_executor(self._parsers, parse, body)
        return await while_connected(request, parsing)

    async def _hold(self, request: Request, target: ModelTarget, stack: contextlib.ExitStack) -> ReadyModel:
        """Return the target's model, which stays in memory until the stack is closed."""
        ready = await while_connected(request, self.models.hold(target))
        stack.callback(self.models.release, ready)
        return ready

    async def _answer(self, asking: _Asking, stack: contextlib.ExitStack) -> Response:
        """Answer, with all that has to be given back on the stack, which a stream takes over."""
        request, shape = asking.request, asking.shape
        headers = {HEADER_DIGEST: asking.ready.served.full_digest}
        with self._engine.expecting():
            plan = await while_connected(request, asking.planning)
            generation = Generation(self._engine, asking.ready, plan, project_id=asking.target.project_id)
            generation.submit()
        self._open.add(generation)
        stack.callback(self._open.discard, generation)
        stack.callback(generation.cancel)
        if not asking.is_stream:
            collecting = collect(generation.events(), plan.make_reader, plan.num_choices)
            answers = await while_connected(request, collecting)
            counted = usage_of(generation)
            headers[HEADER_USAGE] = token_usage(counted).to_text()
            if sum(len(answer.choices) for answer in answers) > _MAX_CHOICES_AT_ONCE:
                return json_response(await asyncio.to_thread(shape.whole, answers, counted), headers=headers)
            return json_response(shape.whole(answers, counted), headers=headers)
        reports_usage = HEADER_USAGE in request.headers
        streamed = StreamedAnswer(shape, generation, plan.make_reader, reports_usage=reports_usage)
        # A failure before the first part is an ordinary HTTP error, not a stream that begins with one.
        begun = await while_connected(request, streamed.start())
        headers[HEADER_USAGE] = TokenUsage(generation.num_prompt_tokens, 0, 0).to_text()
        release = stack.pop_all()

        async def close() -> None:
            release.close()

        return EventStream(streamed.pieces(begun), close, headers)


def build_app(service: Service, settings: Settings, *, token: str | None) -> ASGIApp:
    """Put the endpoints together.

    Args:
        token: the internal token of every request; None on a Unix socket, which its mode protects.

    Returns:
        The ASGI app. Its lifespan starts loading the base and does not wait for it.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        tasks = [
            asyncio.create_task(_preload(service.models, settings.preload_base)),
            asyncio.create_task(_drop_deleted(service.models)),
        ]
        yield
        for task in tasks:
            task.cancel()

    routes: list[tuple[str, Callable[[Request], Coroutine[Any, Any, Response]], str]] = [
        ("/healthz", service.status.health, "GET"),
        ("/internal/state", service.status.state, "GET"),
        ("/metrics", service.status.metrics, "GET"),
        (LOANS_PATH, service.lend, "POST"),
        ("/v1/chat/completions", service.chat, "POST"),
        ("/v1/completions", service.completion, "POST"),
        ("/v1/responses", service.response, "POST"),
    ]
    app: ASGIApp = Starlette(
        routes=[Route(path, endpoint, methods=[method]) for path, endpoint, method in routes],
        exception_handlers=EXCEPTION_HANDLERS,
        lifespan=lifespan,
    )
    app = FaultGate(app)
    return app if token is None else TokenGate(app, token)


async def _preload(models: Models, base_id: str) -> None:
    if not base_id:
        return
    try:
        await models.get_base(base_id)
    except LuthierError as error:
        _LOG.error("The base could not be loaded: %s", error.message)
    else:
        _LOG.info("The base %s is loaded.", base_id)


async def _drop_deleted(models: Models) -> None:
    """Remove deleted models from memory and disk, at intervals."""
    while True:
        await asyncio.sleep(DELETED_CHECK_SECONDS)
        try:
            await models.drop_deleted()
        except (LuthierError, OSError) as error:
            _LOG.warning("Deleted models are looked for again later: %s", error)


ResultT = TypeVar("ResultT")

# The threads of a step wait for each other, and so for one whose processor another thread has.
_NICENESS = 10


def _yield_processor() -> None:
    # On Linux niceness is a thread's own (sched(7)); 0 is the calling one.
    os.setpriority(os.PRIO_PROCESS, 0, max(_NICENESS, os.getpriority(os.PRIO_PROCESS, 0)))


class FairExecutor:
    """Runs functions in threads of its own, of low priority. For one event loop."""

    def __init__(self, num_threads: int, name: str) -> None:
        self._threads = ThreadPoolExecutor(num_threads, name, initializer=_yield_processor)
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def run(self, project_id: str, work: Callable[[], ResultT]) -> ResultT:
        """Run a function when the project's earlier one has ended.

        A caller that is cancelled leaves; work that has begun keeps its project's place until it ends.
        """
        lock = self._locks.setdefault(project_id, asyncio.Lock())
        await lock.acquire()
        future = self._threads.submit(work)
        running = asyncio.wrap_future(future)
        running.add_done_callback(lambda _: lock.release())
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            # Without effect on work that has begun.
            future.cancel()
            raise


class StreamedAnswer:
    """The answers to one request, from the engine's events to bytes.

    Args:
        make_reader: as PartReader takes it.
        reports_usage: whether an event of the usage goes before the last ones.
    """

    def __init__(
        self,
        shape: ResponseFormatter,
        generation: Generation,
        make_reader: Callable[[], ToolCallParser | None],
        *,
        reports_usage: bool = False,
    ) -> None:
        self._reports_usage = reports_usage
        self._shape = shape
        self._generation = generation
        self._reader = PartReader(make_reader)
        self._passes_text = self._reader.passes_text and not generation.has_echoes

    async def start(self) -> bytes:
        """Wait for the first part and return the events up to it."""
        first = self._shape.first_events(len(self._generation.sequences))
        events: list[bytes] = []
        while not events:
            events = self._encode(await self._generation.next_events())
        return b"".join(first + events)

    async def pieces(self, begun: bytes) -> AsyncIterator[bytes]:
        """Yield the events, those that arrive together in one piece; a failure as the last ones."""
        yield begun
        try:
            while self._generation.is_open:
                events = self._encode(await self._generation.next_events())
                if events:
                    yield b"".join(events)
        except Exception as error:  # noqa: BLE001 - the client gets an error event, whatever failed
            yield b"".join(self._shape.error_events(to_client_error(_LOG, "A stream", error)))

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
