"""What a client reads of an answer that broke off at its inference server."""

import asyncio
import json

import pytest
from starlette.types import Message

from api.routes.chat import _PassedOn
from luthier.core.errors import UnavailableError
from luthier.inference.backends.base import Reply


class _Broken:
    def __init__(self) -> None:
        self._pieces = iter([b'data: {"id": 1}\n\n'])

    def __aiter__(self) -> "_Broken":
        return self

    async def __anext__(self) -> bytes:
        for piece in self._pieces:
            return piece
        raise UnavailableError("The model server broke off in the middle of an answer; try again.")

    async def aclose(self) -> None:
        pass


def _read(content_type: str) -> list[bytes]:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def read() -> None:
        await _PassedOn(Reply(200, {"content-type": content_type}, _Broken())).stream_response(send)

    asyncio.run(read())
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
