"""What a client of an inference server makes of a server that is slow, leaves, or is not there."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import pytest
import uvloop

from luthier.core.errors import LuthierError, UnavailableError
from luthier.serving.base import NotAcceptedError
from luthier.serving.engine import InferenceClient

Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
Run = Callable[[Talk, Callable[[InferenceClient], Awaitable[None]]], None]
CHUNKED = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


async def read_request(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    return head + (await reader.readexactly(int(lengths[0].split(b":")[1])) if lengths else b"")


def writing(sent: bytes) -> Talk:
    """Read a request, write something and leave."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(sent)

    return talk


# The API runs on uvloop where there is one, whose transports are not asyncio's.
@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Run:
    """Return what serves by `talk`, and runs a check of a client of it."""

    def run(talk: Talk, check: Callable[[InferenceClient], Awaitable[None]]) -> None:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with suppress(ConnectionError, asyncio.IncompleteReadError):
                await talk(reader, writer)
            writer.close()

        async def serve() -> None:
            path = tmp_path / "s.sock"
            async with await asyncio.start_unix_server(answer, path):
                client = InferenceClient(f"unix://{path}", {"x-of": "all"})
                await check(client)
                await client.aclose()

        with asyncio.Runner(loop_factory=request.param) as runner:
            runner.run(asyncio.wait_for(serve(), 30))

    return run


def test_a_request_has_its_headers_and_body_and_pieces_come_as_the_server_sends_them(run):
    asked: list[bytes] = []
    has_read = asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await read_request(reader))
        writer.write(CHUNKED + b"1\r\na\r\n")
        await has_read.wait()
        writer.write(b"1\r\nb\r\n0\r\n\r\n")

    async def check(client: InferenceClient) -> None:
        response = await client.post("/v1/completions", b'{"a": 1}', {"x-luthier-model": "m"})
        pieces = client.pieces(response)
        assert await anext(pieces) == b"a"
        has_read.set()
        assert [piece async for piece in pieces] == [b"b"]

    run(talk, check)
    head, body = asked[0].split(b"\r\n\r\n")
    lines = head.lower().split(b"\r\n")
    assert (lines[0], body) == (b"post /v1/completions http/1.1", b'{"a": 1}')
    assert {b"x-of: all", b"x-luthier-model: m", b"content-type: application/json"} <= set(lines)
    assert b"transfer-encoding: chunked" not in lines


@pytest.mark.parametrize("sent", [CHUNKED + b"1\r\na\r\n", CHUNKED + b"1\r\na\r\n5\r\nbcd"])
def test_an_answer_that_breaks_off_is_an_error_after_what_came(run, sent):
    async def check(client: InferenceClient) -> None:
        pieces = client.pieces(await client.post("/", b"{}"))
        assert await anext(pieces) == b"a"
        with pytest.raises(UnavailableError, match="broke off in the middle"):
            assert [piece async for piece in pieces] == [b"bcd"]
        with pytest.raises(UnavailableError, match="broke off in the middle"):
            await client.read(await client.post("/", b"{}"))

    run(writing(sent), check)


@pytest.mark.parametrize("sent", [b"", b"HTTP/1.1 200 OK\r\ncontent-"])
def test_a_server_that_disconnects_before_its_answer_may_have_the_request(run, sent):
    async def check(client: InferenceClient) -> None:
        with pytest.raises(UnavailableError) as raised:
            await client.post("/", b"{}")
        # Another server is never asked instead.
        assert not isinstance(raised.value, NotAcceptedError)

    run(writing(sent), check)


def test_a_server_that_is_not_there_never_had_the_request(tmp_path):
    async def check() -> None:
        client = InferenceClient(f"unix://{tmp_path}/nobody.sock")
        with pytest.raises(NotAcceptedError):
            await client.post("/", b"{}")
        with pytest.raises(NotAcceptedError):
            await client.get("/")
        await client.aclose()

    asyncio.run(check())


def test_a_slow_reader_stops_the_server_from_sending(run):
    num_sent, size = 0, 65536

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal num_sent
        await read_request(reader)
        writer.write(CHUNKED)
        while num_sent < 1000:
            writer.write(b"%x\r\n%b\r\n" % (size, b"a" * size))
            await writer.drain()
            num_sent += 1
        writer.write(b"0\r\n\r\n")

    async def check(client: InferenceClient) -> None:
        pieces = client.pieces(await client.post("/", b"{}"))
        num_bytes, num_before = len(await anext(pieces)), -1
        while num_sent != num_before:
            num_before = num_sent
            await asyncio.sleep(0.05)
        # What the sockets and buffers of both sides hold, of 64 MiB.
        assert num_sent < 100
        num_bytes += sum([len(piece) async for piece in pieces])
        assert num_bytes == 1000 * size

    run(talk, check)


def test_a_closed_client_ends_what_it_reads_and_says_that_the_service_stops(run):
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if b"silent" not in await read_request(reader):
            writer.write(CHUNKED + b"1\r\na\r\n")
        await reader.read()

    async def check(client: InferenceClient) -> None:
        pieces = client.pieces(await client.post("/", b"{}"))
        assert await anext(pieces) == b"a"
        asking = asyncio.ensure_future(client.post("/silent", b"{}"))
        await asyncio.sleep(0.05)
        await client.aclose()
        for awaited in (anext(pieces), asking, client.post("/", b"{}")):
            with pytest.raises(UnavailableError, match="shutting down"):
                await awaited

    run(talk, check)


def test_a_state_that_does_not_come_whole_counts_as_no_server(run):
    async def check(client: InferenceClient) -> None:
        with pytest.raises(NotAcceptedError):
            await client.get("/internal/state")

    run(writing(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n{"), check)


@pytest.mark.parametrize(
    "url", ["localhost:8001", "ftp://host", "http://", "http://host:port", "http://[::1"]
)
def test_a_url_of_another_kind_is_refused_by_name(url):
    with pytest.raises(LuthierError, match="no server's URL"):
        InferenceClient(url)


def test_a_url_with_what_would_not_be_sent_is_refused_without_its_password():
    for url in ("http://user:secret@host", "http://host/?a=1", "http://host/#a"):
        with pytest.raises(LuthierError, match="none of which is sent") as raised:
            InferenceClient(url)
        assert "secret" not in str(raised.value)
