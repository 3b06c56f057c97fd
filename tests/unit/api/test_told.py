"""What a client reads of an answer that broke off at its inference server."""

import asyncio
import json

import pytest

from api.routes.chat import _told
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
    async def read() -> list[bytes]:
        return [piece async for piece in _told(Reply(200, {"content-type": content_type}, _Broken()))]

    return asyncio.run(read())


def test_a_stream_ends_with_an_error_that_says_so() -> None:
    first, last = _read("text/event-stream; charset=utf-8")
    assert first == b'data: {"id": 1}\n\n'
    error = json.loads(last.removeprefix(b"data: "))["error"]
    assert error["code"] == "service_unavailable"
    assert "broke off" in error["message"]


def test_a_whole_answer_is_cut_and_not_ended_by_something_else() -> None:
    with pytest.raises(UnavailableError):
        _read("application/json")
