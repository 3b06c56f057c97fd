"""The HTTP face of the engine: OpenAI's three endpoints and the server's status, as a plain Starlette app.

Only the API talks to it. Errors leave in OpenAI's shape; after the first byte as a stream event.
"""

import asyncio
import contextlib
import hmac
import logging
import os
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, ExceptionHandler, Receive, Scope, Send

from luthier.core.errors import (
    InvalidRequestError,
    LuthierError,
    NotFoundError,
    TooLargeError,
    UnauthenticatedError,
)
from luthier.core.inference import (
    HEADER_DIGEST,
    HEADER_TOKEN,
    HEADER_USAGE,
    LOANS_PATH,
    LoanRequest,
    MemoryLoan,
    TokenUsage,
)
from luthier.core.settings import MIB, Settings
from luthier.inference.engine.engine import Engine
from luthier.inference.engine.error_reporting import log_fault, to_client_error
from luthier.inference.engine.sequence import Piece
from luthier.inference.models.base_models import ReadyModel, find_serving_device
from luthier.inference.models.registry import Models, read_target
from luthier.inference.openai.chat_request import (
    ChatRequest,
    CompletionRequest,
    SamplingRequest,
    parse_chat,
    parse_completion,
)
from luthier.inference.openai.chat_response import (
    ChatFormatter,
    CompletionFormatter,
    ResponseFormatter,
    encode_json,
)
from luthier.inference.openai.generation import Generation, IndexedEvent
from luthier.inference.openai.generation_request import GenerationRequest, plan_chat, plan_completion
from luthier.inference.openai.grammar import Grammars
from luthier.inference.openai.responses_request import ResponseRequest, parse_response
from luthier.inference.openai.responses_response import ResponsesFormatter
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
MAX_BODY_BYTES = 16 * MIB
# Where a request's scope keeps the fault that is in the log already.
_LOGGED = "luthier.logged_fault"

ResultT = TypeVar("ResultT")
AskedT = TypeVar("AskedT", bound=SamplingRequest)


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
        return await self._generate(request, parse_chat, self._plan_chat, ChatFormatter)

    async def response(self, request: Request) -> Response:
        """Answer POST /v1/responses."""
        return await self._generate(request, parse_response, self._plan_response, ResponsesFormatter)

    async def completion(self, request: Request) -> Response:
        """Answer POST /v1/completions."""
        return await self._generate(request, parse_completion, self._plan_completion, CompletionFormatter)

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
        self, asked: ResponseRequest, ready: ReadyModel, project_id: str
    ) -> GenerationRequest:
        try:
            return await self._plan_chat(asked, ready, project_id)
        except LuthierError as error:
            if (error.param or "").startswith("messages"):
                error.param = "input"
            raise

    async def _plan_completion(
        self,
        asked: CompletionRequest,
        ready: ReadyModel,
        project_id: str,  # noqa: ARG002
    ) -> GenerationRequest:
        return await asyncio.to_thread(
            plan_completion, asked, ready, max_cache_tokens=self._settings.max_cache_tokens
        )

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

    async def _generate(
        self,
        request: Request,
        parse: Callable[[bytes], AskedT],
        plan: Callable[[AskedT, ReadyModel, str], Coroutine[Any, Any, GenerationRequest]],
        make_formatter: Callable[[AskedT, str, ReadyModel], ResponseFormatter],
    ) -> Response:
        """Check a request, hold its model, plan the answers, submit them, and answer."""
        target = read_target(request.headers)
        asked = await self._read(request, parse)
        with contextlib.ExitStack() as stack:
            ready = await while_connected(request, self.models.hold(target))
            stack.callback(self.models.release, ready)
            formatter = make_formatter(asked, target.model, ready)
            with self._engine.expecting():
                planned = await while_connected(request, plan(asked, ready, target.project_id))
                generation = Generation(self._engine, ready, planned, project_id=target.project_id)
                generation.submit()
            self._open.add(generation)
            stack.callback(self._open.discard, generation)
            stack.callback(generation.cancel)
            headers = {HEADER_DIGEST: ready.served.full_digest}
            if not asked.stream:
                return await self._answer(request, formatter, generation, headers)
            streamed = StreamedAnswer(formatter, generation, reports_usage=HEADER_USAGE in request.headers)
            # A failure before the first part is an ordinary HTTP error, not a stream that begins with one.
            begun = await while_connected(request, streamed.start())
            headers[HEADER_USAGE] = TokenUsage(generation.num_prompt_tokens, 0, 0).to_text()
            # The stream takes over what has to be given back.
            release = stack.pop_all()

            async def close() -> None:
                release.close()

            return EventStream(streamed.pieces(begun), close, headers)

    async def _answer(
        self, request: Request, formatter: ResponseFormatter, generation: Generation, headers: dict[str, str]
    ) -> Response:
        """Return a whole answer."""
        answers = await while_connected(request, generation.collect())
        usage = generation.usage
        headers[HEADER_USAGE] = usage.to_text()
        if sum(len(answer.choices) for answer in answers) > _MAX_CHOICES_AT_ONCE:
            return json_response(await asyncio.to_thread(formatter.whole, answers, usage), headers=headers)
        return json_response(formatter.whole(answers, usage), headers=headers)


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
        reports_usage: whether an event of the usage goes before the last ones.
    """

    def __init__(
        self, formatter: ResponseFormatter, generation: Generation, *, reports_usage: bool = False
    ) -> None:
        self._reports_usage = reports_usage
        self._formatter = formatter
        self._generation = generation

    async def start(self) -> bytes:
        """Wait for the first part and return the events up to it."""
        first = self._formatter.first_events(len(self._generation.sequences))
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
            yield b"".join(self._formatter.error_events(to_client_error(_LOG, "A stream", error)))

    def _encode(self, arrived: list[IndexedEvent]) -> list[bytes]:
        events: list[bytes] = []
        passes_text = self._generation.passes_text
        for index, event in arrived:
            if passes_text and isinstance(event, Piece) and not event.choices:
                # Nearly every event is one: all that others need takes several times as long.
                events.append(self._formatter.text_event(index, event.text))
                continue
            for part in self._generation.read(index, event):
                events += self._formatter.part_events(part)
        if not self._generation.is_open:
            usage = self._generation.usage
            if self._reports_usage:
                events.append(usage.to_event())
            events += self._formatter.last_events(usage)
        return events


async def read_body(request: Request) -> bytes:
    """Read a request's body.

    Raises:
        TooLargeError: when it is longer than MAX_BODY_BYTES.
    """
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise TooLargeError(f"The request is larger than {MAX_BODY_BYTES // MIB} MiB.", param="messages")
    return bytes(body)


def json_response(value: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return a response with a value as JSON."""
    return Response(encode_json(value), status, headers, media_type="application/json")


def _error_response(error: LuthierError) -> Response:
    headers = {"retry-after": str(error.retry_after_seconds)} if error.retryable else None
    return json_response(error.to_body(), status=error.http_status, headers=headers)


async def _on_luthier_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, LuthierError)
    return _error_response(error)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    body = NotFoundError(f"{request.method} {request.url.path[:80]} is not offered by the model server.")
    return json_response(body.to_body(), status=error.status_code)


async def _on_disconnect(_request: Request, _error: Exception) -> Response:
    # The client is gone; 499 is the customary status for the access log.
    return Response(status_code=499)


async def _on_fault(request: Request, error: Exception) -> Response:
    request.scope[_LOGGED] = error
    return _error_response(to_client_error(_LOG, "A request", error))


class FaultGate:
    """Log a fault by its kind and place, and keep it from the web server, which would log its text too."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            await self._app(scope, receive, send)
        except Exception as error:  # noqa: BLE001 - the process must outlive any fault of one request
            # Starlette raises it again after `_on_fault` answered. A response that had begun stays
            # incomplete, and the web server closes its connection.
            if scope.get(_LOGGED) is not error:
                log_fault(_LOG, "A request", error)


class TokenGate:
    """Refuse requests without the internal token.

    Args:
        token: the token, not empty.
    """

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._token = token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 401."""
        if scope["type"] == "http" and scope["path"] != "/healthz":
            headers = dict(scope["headers"])
            given = headers.get(HEADER_TOKEN.encode(), b"")
            if not given and scope["path"] == "/metrics":
                # Prometheus can send a bearer token everywhere, other headers only in newer versions.
                given = headers.get(b"authorization", b"").removeprefix(b"Bearer ")
            if not hmac.compare_digest(given, self._token):
                error = UnauthenticatedError(f"The header {HEADER_TOKEN} is missing or wrong.")
                await _error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)


EXCEPTION_HANDLERS: dict[type[Exception], ExceptionHandler] = {
    LuthierError: _on_luthier_error,
    HTTPException: _on_http_error,
    ClientDisconnect: _on_disconnect,
    Exception: _on_fault,
}
