"""What a client reads of an answer that broke off at its inference server."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import cast

import pytest
from fastapi import Request
from starlette.types import Message

from api.routes.chat import RESPONSES_PATH, ask
from luthier.core.errors import UnavailableError
from luthier.core.inference import ModelTarget, TokenCounts
from luthier.serving.base import Backend, Reply

CHAT = "/v1/chat/completions"
STREAM = "text/event-stream; charset=utf-8"


class _Server:
    """A backend whose stream breaks off after its pieces, or its whole answer where there are none."""

    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces = pieces
        self.num_closed = 0

    async def complete(self, path: str, body: bytes, target: ModelTarget) -> Reply:
        error = UnavailableError("The model server broke off in the middle of an answer; try again.")
        if not self._pieces:
            raise error

        async def events() -> AsyncIterator[bytes]:
            for piece in self._pieces:
                yield piece
            raise error

        return Reply(200, {"content-type": STREAM}, events=events(), aclose=self.aclose)

    async def aclose(self) -> None:
        self.num_closed += 1


async def _stay() -> Message:
    await asyncio.Event().wait()
    raise AssertionError


def _read(
    path: str = CHAT, pieces: tuple[bytes, ...] = (b'data: {"id": 1}\n\n',), usage: TokenCounts | None = None
) -> list[bytes]:
    sent: list[Message] = []
    counts = usage or TokenCounts()
    server = _Server(list(pieces))

    async def send(message: Message) -> None:
        sent.append(message)

    async def run() -> None:
        target = ModelTarget(model="m", base_id="b", project_id="p")
        scope = {"type": "http", "headers": [], "asgi": {"version": "3.0", "spec_version": "2.3"}}
        answer = await ask(Request(scope, _stay), cast("Backend", server), path, b"{}", target, counts)
        await answer(scope, _stay, send)

    asyncio.run(run())
    begin, *bodies, end = sent
    assert (begin["type"], begin["status"]) == ("http.response.start", 200)
    assert (b"content-type", STREAM.encode()) in begin["headers"]
    assert (end["body"], end["more_body"], server.num_closed) == (b"", False, 1)
    return [body["body"] for body in bodies]


def test_a_stream_ends_with_an_error_that_says_so():
    first, last = _read()
    assert first == b'data: {"id": 1}\n\n'
    error = json.loads(last.removeprefix(b"data: "))["error"]
    assert error["code"] == "service_unavailable"
    assert "broke off" in error["message"]


def test_a_whole_answer_that_breaks_off_is_an_error_and_no_answer():
    with pytest.raises(UnavailableError):
        _read(pieces=())


def test_a_stream_of_a_response_ends_as_responses_do():
    created = {"type": "response.created", "sequence_number": 0, "response": {"id": "resp_1", "output": []}}
    pieces = (
        b"event: response.created\ndata: %b\n\n" % json.dumps(created, separators=(",", ":")).encode(),
        b'event: a\ndata: {"type":"a","sequence_number":1}\n\n'
        b'event: b\ndata: {"type":"b","sequence_number":12}\n\n',
    )
    *passed, last = _read(RESPONSES_PATH, pieces)
    assert passed == list(pieces)
    reported, failed = [event.split(b"\n") for event in last.removesuffix(b"\n\n").split(b"\n\n")]
    assert (reported[0], failed[0]) == (b"event: error", b"event: response.failed")
    error, response = (json.loads(lines[1].removeprefix(b"data: ")) for lines in (reported, failed))
    assert (error["type"], error["sequence_number"], error["code"]) == ("error", 13, "service_unavailable")
    assert (response["type"], response["sequence_number"]) == ("response.failed", 14)
    assert response["response"]["id"] == "resp_1"
    assert response["response"]["status"] == "failed"
    assert "broke off" in response["response"]["error"]["message"]


def test_a_client_gets_whole_events_alone_however_they_come():
    *passed, last = _read(pieces=(b'data: {"a', b'": 1}\n', b'\ndata: {"b": 2}\n\ndata: {"c', b'": '))
    assert passed == [b'data: {"a": 1}\n\ndata: {"b": 2}\n\n']
    assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "service_unavailable"


def test_a_response_of_whose_beginning_nothing_was_sent_ends_with_an_error_alone():
    (last,) = _read(RESPONSES_PATH, (b"event: response.cre", b"ated\n"))
    assert last.startswith(b"event: error\n")
    assert b"response.failed" not in last


@pytest.mark.parametrize("num_bytes", [1, 7, 1000])
def test_the_event_of_usage_is_counted_and_not_passed_on_however_it_comes(num_bytes):
    text = b'data: {"a": ": usage 9,9,9"}\n\n'
    stream = text + b": usage 5,2,3\n\ndata: [DONE]\n\n"
    pieces = tuple(stream[at : at + num_bytes] for at in range(0, len(stream), num_bytes))
    usage = TokenCounts()
    *passed, _broken_off = _read(pieces=pieces, usage=usage)
    assert b"".join(passed) == text + b"data: [DONE]\n\n"
    assert usage == TokenCounts(1, 5, 2, 3)


def test_a_stream_that_breaks_off_counts_its_events():
    usage = TokenCounts()
    _read(pieces=(b"data: 1\n\n", b"data: 2\n\ndata: 3\n\n"), usage=usage)
    assert (usage.num_requests, usage.output_tokens) == (1, 3)
