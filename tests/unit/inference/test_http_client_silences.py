"""How long the client of a model server waits for one that says nothing."""

import asyncio

import pytest

from luthier.core.errors import UnavailableError
from luthier.inference.backends import _http
from luthier.inference.backends._http import HttpClient
from tests.unit.inference.test_http_client import CHUNKED, Run, Server, read_request, run

__all__ = ["run"]


def test_a_silent_server_is_not_waited_for_for_ever(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_http, "_READ_SECONDS", 0.05)
    monkeypatch.setattr(_http, "CONNECT_SECONDS", 0.05)

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await read_request(reader)
        if request.startswith(b"POST /begins"):
            writer.write(CHUNKED + b"3\r\none\r\n")
        await reader.read()

    async def check(client: HttpClient, _server: Server) -> None:
        with pytest.raises(UnavailableError, match="in time"):
            await client.post("/", b"{}")
        with pytest.raises(UnavailableError, match="reached"):
            await client.get("/state")
        answer = await client.post("/begins", b"{}")
        assert await anext(answer) == b"one"
        with pytest.raises(UnavailableError, match="middle of an answer"):
            await anext(answer)

    run(talk, check)


def test_a_silence_is_counted_anew_from_each_piece(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_http, "_READ_SECONDS", 0.4)

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(CHUNKED)
        for _ in range(4):
            await asyncio.sleep(0.25)
            writer.write(b"1\r\na\r\n")
        await reader.read()

    async def check(client: HttpClient, _server: Server) -> None:
        answer = await client.post("/", b"{}")
        assert [await anext(answer) for _ in range(4)] == [b"a"] * 4
        loop = asyncio.get_running_loop()
        begun = loop.time()
        with pytest.raises(UnavailableError, match="broke off"):
            await anext(answer)
        assert loop.time() - begun >= 0.39

    run(talk, check)


def test_a_shorter_patience_is_not_kept_waiting_by_a_longer_one(run: Run) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(CHUNKED + b"1\r\na\r\n")
        await asyncio.sleep(0.1)
        writer.write(b"1\r\nb\r\n")
        await reader.read()

    async def check(client: HttpClient, _server: Server) -> None:
        answer = await client.post("/", b"{}")
        assert [await anext(answer) for _ in range(2)] == [b"a", b"b"]
        answer.seconds = 0.1
        with pytest.raises(UnavailableError, match="broke off"):
            await asyncio.wait_for(anext(answer), 5)

    run(talk, check)
