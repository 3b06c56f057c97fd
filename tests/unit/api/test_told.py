"""What a client reads of an answer that broke off at its inference server."""

import asyncio
import json
from collections.abc import Callable
from typing import cast

import pytest
from starlette.types import Message, Send

from api.breaking_off import RESPONSES_PATH
from api.requests import SEND_PIECE
from api.routes.chat import _PassedOn
from luthier.core.errors import UnavailableError
from luthier.core.inference import ModelTarget
from luthier.inference.backends.base import Backend, Reply

CHAT = "/v1/chat/completions"
STREAM = "text/event-stream; charset=utf-8"


class _Broken:
    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces = iter(pieces)

    def __aiter__(self) -> "_Broken":
        return self

    async def __anext__(self) -> bytes:
        for piece in self._pieces:
            return piece
        raise UnavailableError("The model server broke off in the middle of an answer; try again.")

    async def aclose(self) -> None:
        pass


class _Server:
    """A backend that answers as it is told."""

    def __init__(self, reply: Reply) -> None:
        self._reply = reply

    async def complete(self, path: str, body: bytes, target: ModelTarget) -> Reply:
        return self._reply


async def _stay() -> Message:
    await asyncio.Event().wait()
    raise AssertionError


async def _pass_on(reply: Reply, path: str, send: Send, send_piece: Send | None = None) -> None:
    target = ModelTarget(model="m", base_id="b", project_id="p")
    answer = _PassedOn(cast("Backend", _Server(reply)), path, b"{}", target)
    scope = {"type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}}
    await answer(scope if send_piece is None else scope | {SEND_PIECE: send_piece}, _stay, send)


def _read(content_type: str, path: str = CHAT, pieces: list[bytes] | None = None) -> list[bytes]:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    reply = Reply(200, {"content-type": content_type}, _Broken(pieces or [b'data: {"id": 1}\n\n']))
    asyncio.run(_pass_on(reply, path, send))
    begin, *pieces, end = sent
    assert (begin["type"], begin["status"]) == ("http.response.start", 200)
    assert (b"content-type", content_type.encode()) in begin["headers"]
    assert (end["body"], end["more_body"]) == (b"", False)
    return [piece["body"] for piece in pieces]


def test_a_stream_ends_with_an_error_that_says_so() -> None:
    first, last = _read("text/event-stream; charset=utf-8")
    assert first == b'data: {"id": 1}\n\n'
    error = json.loads(last.removeprefix(b"data: "))["error"]
    assert error["code"] == "service_unavailable"
    assert "broke off" in error["message"]


def test_a_whole_answer_is_cut_and_not_ended_by_something_else() -> None:
    with pytest.raises(UnavailableError):
        _read("application/json")


def test_a_stream_of_a_response_ends_as_responses_do() -> None:
    created = {"type": "response.created", "sequence_number": 0, "response": {"id": "resp_1", "output": []}}
    pieces = [
        b"event: response.created\ndata: %b\n\n" % json.dumps(created, separators=(",", ":")).encode(),
        b'event: a\ndata: {"type":"a","sequence_number":1}\n\n'
        b'event: b\ndata: {"type":"b","sequence_number":12}\n\n',
    ]
    *passed, last = _read(STREAM, "/v1/responses", pieces)
    assert passed == pieces
    told, failed = [event.split(b"\n") for event in last.removesuffix(b"\n\n").split(b"\n\n")]
    assert (told[0], failed[0]) == (b"event: error", b"event: response.failed")
    error, response = (json.loads(lines[1].removeprefix(b"data: ")) for lines in (told, failed))
    assert (error["type"], error["sequence_number"], error["code"]) == ("error", 13, "service_unavailable")
    assert (response["type"], response["sequence_number"]) == ("response.failed", 14)
    assert response["response"]["id"] == "resp_1"
    assert response["response"]["status"] == "failed"
    assert "broke off" in response["response"]["error"]["message"]


def test_a_response_whose_beginning_came_in_parts_ends_with_an_error_alone() -> None:
    last = _read(STREAM, "/v1/responses", [b"event: response.cre", b"ated\n"])[-1]
    assert last.startswith(b"event: error\n")
    assert b"response.failed" not in last


class _Passing(_Broken):
    """A body that offers its pieces as they come, and breaks off after those that were not taken."""

    def __init__(self, pieces: list[bytes], sent: list[bytes]) -> None:
        super().__init__([])
        self._offered, self._sent = pieces, sent
        self.take: Callable[[bytes], bool] = lambda _piece: False

    def pass_to(self, take: Callable[[bytes], bool]) -> None:
        self.take = take

    async def __anext__(self) -> bytes:
        for number, piece in enumerate(self._offered):
            assert self.take(piece)
            # It has left before the call returned.
            assert self._sent == self._offered[: number + 1]
        return await super().__anext__()


def test_pieces_that_come_by_a_channel_leave_at_once_past_all_layers_and_their_break_is_told() -> None:
    pieces = [b'event: a\ndata: {"type":"a","sequence_number":%d}\n\n' % number for number in range(3)]
    told: list[Message] = []
    sent: list[bytes] = []

    async def send(message: Message) -> None:
        told.append(message)

    async def send_piece(message: Message) -> None:
        sent.append(message["body"])

    async def read() -> None:
        body = _Passing(pieces, sent)
        await _pass_on(
            Reply(200, {"content-type": STREAM}, body, body.pass_to), RESPONSES_PATH, send, send_piece
        )

    asyncio.run(read())
    assert [message["type"] for message in told] == ["http.response.start", "http.response.body"]
    assert (sent[:3], told[1]["more_body"]) == (pieces, False)
    # It goes on from the numbers of what was passed by.
    (last,) = sent[3:]
    assert json.loads(last.split(b"data: ")[1])["sequence_number"] == 3
