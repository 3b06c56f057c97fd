"""Relays an inference server's answer to the client. Reads neither keys nor names."""

import json
import re
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from luthier.core.errors import LuthierError, UnavailableError
from luthier.core.inference import HEADER_MODEL, HEADER_USAGE, USAGE_EVENT, ModelTarget, TokenUsage
from luthier.inference.server.sse import EventStream, while_connected
from luthier.serving.base import Backend
from services.accounts.usage import TokenCounts

_END_OF_EVENT = b"\n\n"
_USAGE = _END_OF_EVENT + USAGE_EVENT
_NUMBER = re.compile(rb'"sequence_number":(\d+)')
RESPONSES_PATH = "/v1/responses"


async def ask(
    request: Request, backend: Backend, path: str, body: bytes, target: ModelTarget, usage: TokenCounts
) -> Response:
    """Return an inference server's answer, which stops when the client disconnects.

    Args:
        path: of the endpoint.
        target: what the body's model name resolves to.
        usage: set as the answer's usage becomes known.

    Raises:
        LuthierError: when no server could be reached, or it failed before its answer began.
    """
    reply = await while_connected(request, backend.complete(path, body, target))
    headers = dict(reply.headers)
    headers[HEADER_MODEL] = target.resolved_model or target.model
    used = headers.pop(HEADER_USAGE, None)
    if used is not None:
        _set(usage, TokenUsage.from_text(used))
    if reply.events is None:
        return Response(reply.content, reply.status, headers)
    usage.num_requests = 1
    return EventStream(_relay(path, reply.events, usage), reply.aclose, headers)


def _set(usage: TokenCounts, used: TokenUsage) -> None:
    usage.num_requests = 1
    usage.input_tokens, usage.input_cached_tokens, usage.output_tokens = used


def _take_usage(events: bytes, usage: TokenCounts) -> bytes:
    """Return the events without the usage event, which sets `usage`."""
    before, _, rest = (_END_OF_EVENT + events).partition(_USAGE)
    text, _, after = rest.partition(_END_OF_EVENT)
    _set(usage, TokenUsage.from_text(text.decode()))
    return (before + _END_OF_EVENT + after).removeprefix(_END_OF_EVENT)


async def _relay(path: str, pieces: AsyncIterator[bytes], usage: TokenCounts) -> AsyncIterator[bytes]:
    """Yield whole events; a stream that is interrupted ends with an error event in its endpoint's shape.

    Until the usage event, each event counts as a token, so that clients that disconnect are counted, too.
    """
    rest = first = last = b""
    is_reported = False
    try:
        async for piece in pieces:
            events, end, rest = (rest + piece).rpartition(_END_OF_EVENT)
            if end:
                last = events + end
                if _USAGE in last or last.startswith(USAGE_EVENT):
                    last, is_reported = _take_usage(last, usage), True
                elif not is_reported:
                    usage.output_tokens += last.count(_END_OF_EVENT)
                first = first or last
                yield last
    except UnavailableError as error:
        yield _failed_response(error, first, last) if path == RESPONSES_PATH else _failed_chunk(error)


def _failed_chunk(error: LuthierError) -> bytes:
    """Return the event by which SDKs recognise an error."""
    return f"data: {json.dumps(error.to_body())}\n\n".encode()


def _failed_response(error: LuthierError, first: bytes, last: bytes) -> bytes:
    """Return `error` and `response.failed`, numbered after the events that were sent.

    Args:
        first: the events that were sent first, with the response as it began.
        last: the events that were sent last.
    """
    numbers = _NUMBER.findall(last)
    number = int(numbers[-1]) + 1 if numbers else 0
    events = _event("error", number, {"code": error.code, "message": error.message, "param": error.param})
    response = _response_of(first)
    if response is not None:
        failure = {"code": "server_error", "message": error.message}
        failed = {"response": response | {"status": "failed", "error": failure}}
        events += _event("response.failed", number + 1, failed)
    return events


def _event(kind: str, number: int, fields: dict[str, Any]) -> bytes:
    content = {"type": kind, "sequence_number": number} | fields
    return f"event: {kind}\ndata: {json.dumps(content)}\n\n".encode()


def _response_of(events: bytes) -> dict[str, Any] | None:
    """Return the response in a stream's first event, or None without one."""
    for line in events.split(b"\n"):
        if line.startswith(b"data: "):
            try:
                found = json.loads(line.removeprefix(b"data: "))["response"]
            except (ValueError, KeyError, TypeError):
                return None
            return found if isinstance(found, dict) else None
    return None
