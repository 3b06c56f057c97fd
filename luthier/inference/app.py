"""The HTTP face of the engine: OpenAI's two endpoints and a health check, as a plain Starlette app.

Only the API talks to it. Errors leave in OpenAI's shape; after the first byte as a stream event.
"""

import asyncio
import contextlib
import hmac
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from luthier.core.clock import now_seconds
from luthier.core.errors import LuthierError, NotFoundError, TooLargeError, UnauthenticatedError
from luthier.core.ids import new_id
from luthier.core.inference import HEADER_DIGEST, HEADER_TOKEN
from luthier.core.settings import MIB, Settings
from luthier.inference import answers
from luthier.inference.answers import ChatShape, CompletionShape, Shape
from luthier.inference.engine import Engine
from luthier.inference.generation import Generation, IndexedEvent, plan_chat, plan_completion
from luthier.inference.models import Models, read_target
from luthier.inference.protocol import parse_chat, parse_completion
from luthier.inference.sequence import ChoiceAt, Finish, FinishReason, Piece

_LOG = logging.getLogger(__name__)
MAX_BODY_BYTES = 16 * MIB
_RETRY_AFTER_SECONDS = 1
_STREAM_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}

ResultT = TypeVar("ResultT")


class Service:
    """The endpoints, over the models and the engine.

    Args:
        settings: the server's.
        engine: the engine's thread.
    """

    def __init__(self, settings: Settings, engine: Engine) -> None:
        self._settings = settings
        self._engine = engine
        self._open: set[Generation] = set()
        self.models = Models(settings)

    async def health(self, _request: Request) -> Response:
        """Say that the process answers, and whether its preloaded base does."""
        base = self._settings.preload_base
        is_ready = self._engine.is_alive and (not base or self.models.is_loaded(base))
        return _json({"status": "ok", "base": base, "ready": is_ready})

    async def chat(self, request: Request) -> Response:
        """Answer POST /v1/chat/completions."""
        target = read_target(request.headers)
        asked = parse_chat(await _read_body(request))
        served = await self.models.get(target)
        default = self._settings.max_tokens_default
        prompts, options = await asyncio.to_thread(plan_chat, asked, served, max_tokens_default=default)
        shape = ChatShape(
            id=new_id("chat_completion"),
            created=now_seconds(),
            model=target.model,
            fingerprint=served.fingerprint,
            tokenizer=served.base.tokenizer,
            with_logprobs=asked.logprobs,
            with_usage=asked.stream_options.include_usage,
        )
        generation = Generation(served, prompts, options)
        headers = {HEADER_DIGEST: target.digest or served.base.facts.digest}
        return await self._answer(request, shape, generation, headers, is_stream=asked.stream)

    async def completion(self, request: Request) -> Response:
        """Answer POST /v1/completions."""
        target = read_target(request.headers)
        asked = parse_completion(await _read_body(request))
        served = await self.models.get(target)
        prompts, options = await asyncio.to_thread(plan_completion, asked, served)
        shape = CompletionShape(
            id=new_id("completion"),
            created=now_seconds(),
            model=target.model,
            fingerprint=served.fingerprint,
            tokenizer=served.base.tokenizer,
            with_logprobs=asked.logprobs is not None,
            with_usage=asked.stream_options.include_usage,
        )
        generation = Generation(served, prompts, options)
        headers = {HEADER_DIGEST: target.digest or served.base.facts.digest}
        return await self._answer(request, shape, generation, headers, is_stream=asked.stream)

    def interrupt(self) -> None:
        """End every open answer with an error; the process is going to stop."""
        self._engine.close()
        for generation in list(self._open):
            generation.interrupt()

    async def _answer(
        self,
        request: Request,
        shape: Shape,
        generation: Generation,
        headers: dict[str, str],
        *,
        is_stream: bool,
    ) -> Response:
        generation.submit(self._engine)
        self._open.add(generation)
        is_handed_over = False
        try:
            if not is_stream:
                return _json(await _while_connected(request, _collect(shape, generation)), headers=headers)
            events = generation.events()
            # A failure before the first event is an ordinary HTTP error, not a stream that begins with one.
            first = await _while_connected(request, anext(events))
            is_handed_over = True
            stream = self._stream(shape, generation, first, events)
            return _EventStream(stream, _STREAM_HEADERS | headers, lambda: self._close(generation))
        finally:
            if not is_handed_over:
                self._close(generation)

    def _close(self, generation: Generation) -> None:
        generation.cancel()
        self._open.discard(generation)

    async def _stream(
        self, shape: Shape, generation: Generation, first: IndexedEvent, events: AsyncIterator[IndexedEvent]
    ) -> AsyncIterator[bytes]:
        try:
            for chunk in shape.first_chunks(len(generation.sequences)):
                yield answers.encode_event(chunk)
            yield answers.encode_event(_to_chunk(shape, first))
            async for event in events:
                yield answers.encode_event(_to_chunk(shape, event))
            if shape.with_usage:
                yield answers.encode_event(shape.usage_chunk(_usage(generation)))
            yield answers.DONE_EVENT
        except LuthierError as error:
            yield answers.encode_event(answers.error_body(error))


class _EventStream(StreamingResponse):
    """A stream that gives its rows back however it ends, even when the client left before it began."""

    def __init__(
        self, events: AsyncIterator[bytes], headers: dict[str, str], close: Callable[[], None]
    ) -> None:
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()


def _to_chunk(shape: Shape, event: IndexedEvent) -> dict[str, Any]:
    index, part = event
    if isinstance(part, Finish):
        return shape.finish_chunk(index, part.reason)
    assert isinstance(part, Piece)
    return shape.piece_chunk(index, part)


def _usage(generation: Generation) -> dict[str, Any]:
    return answers.usage(generation.num_prompt_tokens, generation.num_completion_tokens)


async def _collect(shape: Shape, generation: Generation) -> dict[str, Any]:
    num_choices = len(generation.sequences)
    texts: list[list[str]] = [[] for _ in range(num_choices)]
    choices: list[list[ChoiceAt]] = [[] for _ in range(num_choices)]
    reasons: list[FinishReason] = ["stop"] * num_choices
    async for index, event in generation.events():
        if isinstance(event, Piece):
            texts[index].append(event.text)
            choices[index].extend(event.choices)
        elif isinstance(event, Finish):
            reasons[index] = event.reason
    parts = [shape.choice(i, "".join(texts[i]), choices[i], reasons[i]) for i in range(num_choices)]
    return shape.whole(parts, _usage(generation))


async def _while_connected(request: Request, work: Awaitable[ResultT]) -> ResultT:
    """Await work; cancel it and raise ClientDisconnect when the client leaves first."""
    task = asyncio.ensure_future(_as_coroutine(work))
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        gone.cancel()
        task.cancel()


async def _as_coroutine(work: Awaitable[ResultT]) -> ResultT:
    return await work


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _read_body(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise TooLargeError(f"The request is larger than {MAX_BODY_BYTES // MIB} MiB.", param="messages")
    return bytes(body)


def _json(value: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(answers.encode_json(value), status, headers, media_type="application/json")


def _error_response(error: LuthierError) -> Response:
    headers = {"retry-after": str(_RETRY_AFTER_SECONDS)} if error.retryable else None
    return _json(answers.error_body(error), status=error.http_status, headers=headers)


async def _on_luthier_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, LuthierError)
    return _error_response(error)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    body = NotFoundError(f"{request.method} {request.url.path[:80]} is not offered by the model server.")
    return _json(answers.error_body(body), status=error.status_code)


async def _on_disconnect(_request: Request, _error: Exception) -> Response:
    # Nobody reads it; 499 is the customary status for the access log.
    return Response(status_code=499)


class TokenGate:
    """Let only requests pass that bear the internal token.

    Args:
        app: the app behind it.
        token: the token, not empty.
    """

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._token = token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 401."""
        if scope["type"] == "http" and scope["path"] != "/healthz":
            given = dict(scope["headers"]).get(HEADER_TOKEN.encode(), b"")
            if not hmac.compare_digest(given, self._token):
                error = UnauthenticatedError(f"The header {HEADER_TOKEN} is missing or wrong.")
                await _error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def build_app(service: Service, settings: Settings, *, token: str | None) -> ASGIApp:
    """Put the endpoints together.

    Args:
        service: the endpoints.
        settings: says which base to load at start.
        token: what requests must bear; None on a Unix socket, whose mode is the guard.

    Returns:
        The ASGI app. Its lifespan starts loading the base and does not wait for it.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        preload = asyncio.create_task(_preload(service.models, settings.preload_base))
        yield
        preload.cancel()

    routes: list[tuple[str, Callable[[Request], Coroutine[Any, Any, Response]], str]] = [
        ("/healthz", service.health, "GET"),
        ("/v1/chat/completions", service.chat, "POST"),
        ("/v1/completions", service.completion, "POST"),
    ]
    app = Starlette(
        routes=[Route(path, endpoint, methods=[method]) for path, endpoint, method in routes],
        exception_handlers={
            LuthierError: _on_luthier_error,
            HTTPException: _on_http_error,
            ClientDisconnect: _on_disconnect,
        },
        lifespan=lifespan,
    )
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
