"""The client of a model server against a server whose bytes each test writes itself."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import pytest
import uvloop

from luthier.core.errors import UnavailableError
from luthier.inference.backends import _http
from luthier.inference.backends._http import HttpClient
from luthier.inference.backends.base import NotAcceptedError

Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
CHUNKED = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
Run = Callable[[Talk, Callable[[HttpClient, "Server"], Awaitable[None]]], None]
ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


class Server:
    """Counts connections; `talk` answers each."""

    def __init__(self, talk: Talk) -> None:
        self._talk = talk
        self.num_connections = 0

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            await self._talk(reader, writer)
        writer.close()


async def read_request(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    return head + (await reader.readexactly(int(lengths[0].split(b":")[1])) if lengths else b"")


# Servers run on uvloop where there is one, whose transports are not asyncio's.
@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Run:
    """Return what serves by `talk`, and runs a check of a client of it."""

    def run(talk: Talk, check: Callable[[HttpClient, Server], Awaitable[None]]) -> None:
        async def serve() -> None:
            path = tmp_path / "s.sock"
            server = Server(talk)
            async with await asyncio.start_unix_server(server, path):
                client = HttpClient(f"unix://{path}", {"x-of": "all"})
                await check(client, server)
                await client.aclose()

        with asyncio.Runner(loop_factory=request.param) as runner:
            runner.run(asyncio.wait_for(serve(), 30))

    return run


async def _answer_all(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while True:
        await read_request(reader)
        writer.write(ANSWER)


def test_a_request_carries_its_headers_and_body(run: Run) -> None:
    seen: list[bytes] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await read_request(reader))
        writer.write(ANSWER)

    async def check(client: HttpClient, _server: Server) -> None:
        answer = await client.post("/v1/completions", b'{"a": 1}', {"x-of": "this", "x-more": "1"})
        assert (answer.status, await answer.read()) == (200, b"ok")

    run(talk, check)
    head, _, body = seen[0].partition(b"\r\n\r\n")
    assert head.startswith(b"POST /v1/completions HTTP/1.1\r\nhost: inference\r\n")
    assert b"\r\ncontent-type: application/json\r\n" in head
    assert b"\r\nx-more: 1" in head
    assert b"\r\nx-of: this\r\n" in head
    assert b"x-of: all" not in head
    assert body == b'{"a": 1}'


def test_pieces_come_as_the_server_sends_them(run: Run) -> None:
    may_go_on = asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        # A chunk's border in the middle of its own length, and two chunks at once.
        writer.write(CHUNKED + b"3\r\none\r\n1")
        await may_go_on.wait()
        writer.write(b"0\r\n0123456789abcdef\r\n2\r\ngh\r\n0\r\n\r\n")

    async def check(client: HttpClient, _server: Server) -> None:
        answer = await client.post("/", b"{}")
        assert answer.headers["content-type"] == "text/event-stream"
        assert await anext(answer) == b"one"
        may_go_on.set()
        assert await answer.read() == b"0123456789abcdefgh"
        with pytest.raises(StopAsyncIteration):
            await anext(answer)

    run(talk, check)


def test_a_connection_is_used_again_and_never_with_what_another_answer_left(run: Run) -> None:
    async def check(client: HttpClient, server: Server) -> None:
        first = await client.post("/", b"{}")
        # Whole, and unread: what it brought is not the next answer's.
        await first.aclose()
        for _ in range(3):
            assert await client.get("/state") == (200, b"ok")
        assert server.num_connections == 1
        open_at_once = [await client.post("/", b"{}") for _ in range(3)]
        assert server.num_connections == 3
        assert [await answer.read() for answer in open_at_once] == [b"ok"] * 3

    run(_answer_all, check)


def test_an_idle_connection_is_dropped_before_the_server_would(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_http, "_IDLE_SECONDS", 0.0)

    async def check(client: HttpClient, server: Server) -> None:
        assert await client.get("/state") == (200, b"ok")
        assert await client.get("/state") == (200, b"ok")
        assert server.num_connections == 2

    run(_answer_all, check)


def test_a_connection_that_the_server_closed_is_not_used_again(run: Run) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(ANSWER)

    async def check(client: HttpClient, server: Server) -> None:
        assert await client.get("/state") == (200, b"ok")
        await asyncio.sleep(0.05)
        assert await client.get("/state") == (200, b"ok")
        assert server.num_connections == 2

    run(talk, check)


def test_an_answer_without_a_length_ends_with_its_connection(run: Run) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 103 Early Hints\r\nlink: <a>\r\n\r\nHTTP/1.1 200 OK\r\n\r\nto the end")

    async def check(client: HttpClient, _server: Server) -> None:
        answer = await client.post("/", b"{}")
        assert (answer.status, answer.headers) == (200, {})
        assert await answer.read() == b"to the end"

    run(talk, check)


@pytest.mark.parametrize(
    "sent",
    [
        CHUNKED + b"3\r\none\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\none",
        CHUNKED + b"3\r\none\r\nno length",
    ],
)
def test_an_answer_that_breaks_off_is_an_error_after_what_came(run: Run, sent: bytes) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(sent)

    async def check(client: HttpClient, _server: Server) -> None:
        answer = await client.post("/", b"{}")
        assert await anext(answer) == b"one"
        with pytest.raises(UnavailableError, match="middle of an answer") as raised:
            await anext(answer)
        assert not isinstance(raised.value, NotAcceptedError)

    run(talk, check)


@pytest.mark.parametrize("sent", [b"", b"HTTP/1.1 200 OK\r\nconte", b"no HTTP\r\n\r\n"])
def test_a_server_that_leaves_before_its_answer_may_have_the_request(run: Run, sent: bytes) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(sent)

    async def check(client: HttpClient, _server: Server) -> None:
        with pytest.raises(UnavailableError, match="before it had answered") as raised:
            await client.post("/", b"{}")
        assert not isinstance(raised.value, NotAcceptedError)

    run(talk, check)


def test_a_server_that_leaves_before_the_request_was_out_never_had_it(run: Run) -> None:
    async def talk(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(10)

    async def check(client: HttpClient, _server: Server) -> None:
        with pytest.raises(NotAcceptedError):
            await client.post("/", bytes(32 * 1024 * 1024))

    run(talk, check)


def test_a_reader_that_leaves_closes_the_connection(run: Run) -> None:
    has_left = asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(CHUNKED + b"3\r\none\r\n")
        assert await reader.read() == b""
        has_left.set()

    async def check(client: HttpClient, server: Server) -> None:
        answer = await client.post("/", b"{}")
        assert await anext(answer) == b"one"
        reading = asyncio.ensure_future(anext(answer))
        await asyncio.sleep(0)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        await asyncio.wait_for(has_left.wait(), 5)
        has_left.clear()
        await (await client.post("/", b"{}")).aclose()
        await asyncio.wait_for(has_left.wait(), 5)
        assert server.num_connections == 2

    run(talk, check)


def test_a_slow_reader_holds_the_server_up(run: Run) -> None:
    size, num_pieces = 64 * 1024, 200
    num_sent = 0

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal num_sent
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % (size * num_pieces))
        for _ in range(num_pieces):
            writer.write(bytes(size))
            await writer.drain()
            num_sent += 1

    async def check(client: HttpClient, _server: Server) -> None:
        answer = await client.post("/", b"{}")
        await asyncio.sleep(0.2)
        assert num_sent < num_pieces / 2
        assert len(await answer.read()) == size * num_pieces

    run(talk, check)


def test_what_an_unread_answer_held_up_is_not_held_up_for_the_next(run: Run) -> None:
    large = b"HTTP/1.1 200 OK\r\ncontent-length: 400000\r\n\r\n" + bytes(400_000)

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            request = await read_request(reader)
            writer.write(large if request.startswith(b"POST") else ANSWER)

    async def check(client: HttpClient, _server: Server) -> None:
        for _ in range(5):
            answer = await client.post("/", b"{}")
            assert answer._connection is not None
            while not answer._connection.is_over:
                await asyncio.sleep(0)
            await answer.aclose()
            assert await client.get("/state") == (200, b"ok")

    run(talk, check)


@pytest.mark.parametrize("more", [ANSWER, ANSWER[:20], b"no HTTP"])
def test_what_follows_an_answer_unasked_is_neither_read_nor_trusted(run: Run, more: bytes) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(ANSWER + more)
        await reader.read()

    async def check(client: HttpClient, server: Server) -> None:
        for number in range(2):
            answer = await client.post("/", b"{}")
            assert (answer.status, await answer.read()) == (200, b"ok")
            assert server.num_connections == number + 1

    run(talk, check)


def test_a_connection_on_which_a_request_still_leaves_is_not_used_again(run: Run) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(ANSWER.replace(b"200 OK", b"413 Content Too Large"))
        await writer.drain()
        await asyncio.Event().wait()

    async def check(client: HttpClient, server: Server) -> None:
        for number in range(2):
            answer = await client.post("/", bytes(32 * 1024 * 1024))
            assert (answer.status, await answer.read()) == (413, b"ok")
            assert server.num_connections == number + 1

    run(talk, check)


def test_an_answer_without_a_length_that_the_client_ends_is_not_whole(run: Run) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\n\r\nthe begin")
        await reader.read()

    async def check(client: HttpClient, _server: Server) -> None:
        answer = await client.post("/", b"{}")
        assert await anext(answer) == b"the begin"
        reading = asyncio.ensure_future(anext(answer))
        await asyncio.sleep(0)
        await client.aclose()
        with pytest.raises(UnavailableError, match="middle of an answer"):
            await reading

    run(talk, check)


def test_a_server_that_leaves_while_it_is_asked_how_it_is_counts_as_not_there(run: Run) -> None:
    async def talk(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        await read_request(reader)

    async def check(client: HttpClient, _server: Server) -> None:
        with pytest.raises(NotAcceptedError):
            await client.get("/state")

    run(talk, check)


def test_an_endless_head_is_refused(run: Run) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\n" + b"x-filler: 0123456789\r\n" * 10_000)
        await reader.read()

    async def check(client: HttpClient, _server: Server) -> None:
        with pytest.raises(UnavailableError, match="before it had answered"):
            await client.post("/", b"{}")

    run(talk, check)


def test_a_server_is_found_by_its_name() -> None:
    async def serve() -> None:
        async with await asyncio.start_server(Server(_answer_all), "127.0.0.1", 0) as listening:
            port = listening.sockets[0].getsockname()[1]
            client = HttpClient(f"http://localhost:{port}/behind", {})
            assert await client.get("/state") == (200, b"ok")
            await client.aclose()

    asyncio.run(asyncio.wait_for(serve(), 30))


def test_a_header_cannot_bring_lines_of_its_own(run: Run) -> None:
    async def check(client: HttpClient, server: Server) -> None:
        with pytest.raises(ValueError, match="line break"):
            await client.post("/", b"{}", {"x-model": "a\r\nx-project: other"})
        assert server.num_connections == 0

    run(_answer_all, check)
