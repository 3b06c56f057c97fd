"""Pieces of an answer that somebody takes as they come, in its reader's place."""

import asyncio
import logging

import pytest

from luthier.core.errors import UnavailableError
from luthier.inference.backends._http import HttpClient
from tests.unit.inference.test_http_client import CHUNKED, Run, Server, read_request, run

__all__ = ["run"]


def test_pieces_are_taken_until_one_is_not_and_the_rest_is_read_in_order(run: Run) -> None:
    may_go_on = asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(CHUNKED + b"1\r\n0\r\n")
        await may_go_on.wait()
        writer.write(b"1\r\n1\r\n1\r\n2\r\n")
        await asyncio.sleep(0.01)
        writer.write(b"1\r\n3\r\n1\r\n4\r\n1\r\n5\r\n0\r\n\r\n")

    async def check(client: HttpClient, _server: Server) -> None:
        answer = await client.post("/", b"{}")
        taken: list[bytes] = []

        def take(piece: bytes) -> bool:
            if piece != b"4":
                taken.append(piece)
            return piece != b"4"

        answer.pass_to(take)
        # Before anybody waited for it.
        assert await anext(answer) == b"0"
        may_go_on.set()
        # While the reader has something to read, nothing passes it by.
        assert await anext(answer) == b"45"
        assert taken == [b"1", b"2", b"3"]
        with pytest.raises(StopAsyncIteration):
            await anext(answer)

    run(talk, check)


@pytest.mark.parametrize("rest", [b"1\r\n2\r\n0\r\n\r\n", b"0\r\n\r\n", b""])
def test_an_answer_whose_piece_could_not_be_taken_has_a_gap_and_ends_there(
    run: Run, caplog: pytest.LogCaptureFixture, rest: bytes
) -> None:
    may_go_on = asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(CHUNKED)
        await may_go_on.wait()
        writer.write(b"1\r\n1\r\n" + rest)
        await reader.read()

    async def check(client: HttpClient, server: Server) -> None:
        answer = await client.post("/", b"{}")
        answer.pass_to(lambda piece: 1 // (int(piece) - 1) == 0)
        asyncio.get_running_loop().call_later(0.01, may_go_on.set)
        with pytest.raises(UnavailableError, match="broke off"):
            await anext(answer)
        # Its connection is not used again.
        may_go_on.set()
        await client.post("/", b"{}")
        assert server.num_connections == 2

    with caplog.at_level(logging.ERROR):
        run(talk, check)
    assert "A piece that was passed on" in caplog.text
