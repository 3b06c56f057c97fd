"""Streams that come by a channel, from a server whose bytes each test writes itself."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import pytest
import uvloop

from luthier.core.errors import UnavailableError
from luthier.core.inference import CHANNEL_PATH, HEADER_CHANNEL, HEADER_STREAM
from luthier.inference.backends import _channel, _connection, _http
from luthier.inference.backends._channel import ChannelClient
from luthier.inference.backends._http import Answer, HttpClient
from luthier.inference.frames import to_frame

CHUNKED = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n"


class _Server:
    """A server with channels, whose answers the test writes: `channel` and `answers`, by stream number."""

    def __init__(self, *, has_channels: bool = True) -> None:
        self.has_channels = has_channels
        self.channel_id: str | None = None
        self.channel: asyncio.StreamWriter | None = None
        self.answers: dict[str, asyncio.StreamWriter] = {}
        self.left: list[str] = []
        self.num_refused = 0
        self.holds_heads, self.held_head = False, b""

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                await self._take(await _read_request(reader), writer)
        for number, answer in self.answers.items():
            if answer is writer:
                self.left.append(number)
        writer.close()

    async def _take(self, headers: dict[str, str], writer: asyncio.StreamWriter) -> None:
        if headers["path"] == CHANNEL_PATH:
            if not self.has_channels:
                self.num_refused += 1
                writer.write(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n")
                return
            self.channel_id, self.channel = headers[HEADER_CHANNEL], writer
            writer.write(f"{CHUNKED}\r\n".encode())
            return
        number = headers.get(HEADER_STREAM, "none")
        self.answers[number] = writer
        told = f"{HEADER_CHANNEL}: {headers[HEADER_CHANNEL]}\r\n" if HEADER_CHANNEL in headers else ""
        head = f"{CHUNKED}{told}\r\n".encode()
        if self.holds_heads:
            self.held_head = head
        else:
            writer.write(head)

    def send(self, number: str, content: bytes) -> None:
        """Send a frame by the channel."""
        assert self.channel is not None
        frame = to_frame(int(number), content)
        self.channel.write(b"%x\r\n%s\r\n" % (len(frame), frame))

    def end_answer(self, number: str) -> None:
        """End a stream's own answer."""
        self.answers[number].write(b"0\r\n\r\n")

    def break_off(self) -> None:
        """End the channel."""
        assert self.channel is not None
        self.channel.transport.abort()


async def _read_request(reader: asyncio.StreamReader) -> dict[str, str]:
    first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines if line)
    await reader.readexactly(int(headers.get("content-length", "0")))
    return {"path": first.split(" ")[1], **headers}


class _Asker:
    """What EngineBackend does of it."""

    def __init__(self, client: HttpClient) -> None:
        self._client = client
        self.channel = ChannelClient(client)

    async def ask(self) -> Answer:
        feed = self.channel.offer()
        return await self._client.post("/v1/completions", b"{}", feed.headers, feed)

    async def open(self, server: _Server) -> None:
        """Ask once, so that the channel is opened, and wait until it is."""
        answer = await self.ask()
        assert list(server.answers) == ["none"]
        server.answers["none"].write(b"3\r\nown\r\n0\r\n\r\n")
        assert await answer.read() == b"own"
        async with asyncio.timeout(10):
            while self.channel._open is None:
                await asyncio.sleep(0.01)

    async def begin(self, server: _Server) -> tuple[Answer, str]:
        """Open the channel and ask for one stream by it; return its answer and its number."""
        await self.open(server)
        return await self.ask(), list(server.answers)[-1]


Check = Callable[[_Server, _Asker], Awaitable[None]]
Run = Callable[[_Server, Check], None]


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Run:
    """Return what runs a check of a client beside a server."""

    def run(server: _Server, check: Check) -> None:
        async def serve() -> None:
            path = tmp_path / "s.sock"
            async with await asyncio.start_unix_server(server, path):
                client = HttpClient(f"unix://{path}", {})
                asker = _Asker(client)
                await check(server, asker)
                await asker.channel.aclose()
                await client.aclose()

        with asyncio.Runner(loop_factory=request.param) as runner:
            runner.run(asyncio.wait_for(serve(), 30))

    return run


def test_pieces_that_are_taken_as_they_come_wake_no_reader_and_others_are_read_in_their_order(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check(server: _Server, asker: _Asker) -> None:
        answer, number = await asker.begin(server)
        taken: list[bytes] = []

        def take(piece: bytes) -> bool:
            taken.append(piece)
            return piece != b"no"

        answer.pass_to(take)
        reading = asyncio.ensure_future(anext(answer))
        await asyncio.sleep(0.05)
        server.send(number, b"no")
        assert await reading == b"no"
        reading = asyncio.ensure_future(anext(answer))
        for piece in (b"a", b"b", b"c"):
            await asyncio.sleep(0.2)
            server.send(number, piece)
        await asyncio.sleep(0.2)
        # It waits longer in all than the longest silence, and no longer than that.
        assert (taken, reading.done()) == ([b"no", b"a", b"b", b"c"], False)
        with pytest.raises(UnavailableError):
            await reading

    monkeypatch.setattr(_http, "_READ_SECONDS", 0.4)
    run(_Server(), check)


def test_what_fails_on_a_piece_ends_its_own_stream_alone(run: Run) -> None:
    async def check(server: _Server, asker: _Asker) -> None:
        await asker.open(server)
        first, second = [await asker.ask() for _ in range(2)]
        first.pass_to(lambda piece: bool(1 // len(piece[1:])))
        reading, other = (asyncio.ensure_future(anext(answer)) for answer in (first, second))
        await asyncio.sleep(0.05)
        for number in list(server.answers)[1:]:
            server.send(number, b"a")
        with pytest.raises(UnavailableError, match="broke off"):
            await reading
        assert await other == b"a"

    run(_Server(), check)


def test_streams_of_one_channel_are_told_apart_and_end_each_for_itself(run: Run) -> None:
    async def check(server: _Server, asker: _Asker) -> None:
        await asker.open(server)
        first, second = [await asker.ask() for _ in range(2)]
        one, two = list(server.answers)[1:]
        server.send(one, b"a")
        server.send(two, b"b")
        server.send(one, b"c")
        assert await anext(second) == b"b"
        # Its own answer may end before the channel has brought everything.
        server.end_answer(one)
        await asyncio.sleep(0.05)
        server.send(one, b"d")
        server.send(one, b"")
        assert await first.read() == b"acd"
        # Or after.
        server.send(two, b"")
        reading = asyncio.ensure_future(second.read())
        await asyncio.sleep(0.05)
        assert not reading.done()
        server.end_answer(two)
        assert await reading == b""
        # What is for nobody hurts nobody.
        server.send(one, b"late")
        # Both connections are used again.
        assert len({id(writer) for writer in server.answers.values()}) == 2
        third = await asker.ask()
        assert len({id(writer) for writer in server.answers.values()}) == 2
        number = list(server.answers)[-1]
        server.send(number, b"e")
        server.send(number, b"")
        server.end_answer(number)
        assert await third.read() == b"e"

    run(_Server(), check)


def test_a_channel_that_breaks_off_ends_what_came_by_it_and_is_opened_again(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_channel, "_RETRY_SECONDS", 0.0)

    async def check(server: _Server, asker: _Asker) -> None:
        await asker.open(server)
        before = server.channel_id
        begun, waiting = [await asker.ask() for _ in range(2)]
        one, two = list(server.answers)[1:]
        server.send(one, b"a")
        # Over by its own answer, but not by the channel.
        server.end_answer(two)
        assert await anext(begun) == b"a"
        server.break_off()
        for answer in (begun, waiting):
            with pytest.raises(UnavailableError, match="broke off"):
                await anext(answer)
        server.answers.clear()
        await asker.open(server)
        assert server.channel_id != before
        again = await asker.ask()
        [number] = list(server.answers)[1:]
        server.send(number, b"b")
        server.send(number, b"")
        server.end_answer(number)
        assert await again.read() == b"b"

    run(_Server(), check)


def test_a_stream_breaks_off_with_its_own_answer(run: Run) -> None:
    async def check(server: _Server, asker: _Asker) -> None:
        answer, number = await asker.begin(server)
        server.send(number, b"a")
        assert await anext(answer) == b"a"
        server.answers[number].transport.abort()
        with pytest.raises(UnavailableError, match="broke off"):
            await anext(answer)

    run(_Server(), check)


def test_a_channel_that_is_lost_on_the_way_is_known_by_its_silence(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_channel, "_SILENCE_SECONDS", 1.5)

    async def check(server: _Server, asker: _Asker) -> None:
        answer, number = await asker.begin(server)
        # Longer than that in all.
        for _ in range(18):
            await asyncio.sleep(0.1)
            server.send("0", b"")
        server.send(number, b"a")
        assert await anext(answer) == b"a"
        with pytest.raises(UnavailableError, match="broke off"):
            await anext(answer)

    run(_Server(), check)


def test_what_does_not_come_after_its_own_answer_has_ended_is_not_waited_for_long(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_connection, "_REST_SECONDS", 0.2)

    async def check(server: _Server, asker: _Asker) -> None:
        answer, number = await asker.begin(server)
        server.send(number, b"a")
        assert await anext(answer) == b"a"
        server.end_answer(number)
        with pytest.raises(UnavailableError, match="broke off"):
            await asyncio.wait_for(anext(answer), 5)

    run(_Server(), check)


def test_what_nobody_reads_breaks_off_before_it_takes_all_memory(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_connection, "_MAX_FED_BYTES", 10_000)

    async def check(server: _Server, asker: _Asker) -> None:
        await asker.open(server)
        slow, quick = [await asker.ask() for _ in range(2)]
        one, two = list(server.answers)[1:]
        for _ in range(30):
            server.send(one, b"x" * 1000)
            server.send(two, b"y" * 1000)
            assert await anext(quick) == b"y" * 1000
        server.send(two, b"")
        server.end_answer(two)
        assert await quick.read() == b""
        # What had come before is told.
        assert len(await anext(slow)) == 11_000
        with pytest.raises(UnavailableError, match="broke off"):
            await anext(slow)

    run(_Server(), check)


@pytest.mark.parametrize("when", ["after its own answer", "before its head"])
def test_what_broke_off_is_not_whole_though_its_end_comes(
    run: Run, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    monkeypatch.setattr(_connection, "_MAX_FED_BYTES", 10_000)

    async def check(server: _Server, asker: _Asker) -> None:
        await asker.open(server)
        server.holds_heads = when == "before its head"
        asking = asyncio.ensure_future(asker.ask())
        async with asyncio.timeout(10):
            while len(server.answers) == 1:
                await asyncio.sleep(0.01)
        number = list(server.answers)[-1]
        if not server.holds_heads:
            answer = await asking
            server.end_answer(number)
            await asyncio.sleep(0.05)
        for _ in range(30):
            server.send(number, b"x" * 1000)
        server.send(number, b"")
        await asyncio.sleep(0.05)
        if server.holds_heads:
            server.answers[number].write(server.held_head + b"0\r\n\r\n")
            answer = await asking
        assert len(await anext(answer)) == 11_000
        with pytest.raises(UnavailableError, match="broke off"):
            await anext(answer)

    run(_Server(), check)


def test_an_answer_whose_own_end_is_lost_is_not_waited_for_long(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_connection, "_REST_SECONDS", 0.2)

    async def check(server: _Server, asker: _Asker) -> None:
        answer, number = await asker.begin(server)
        server.send(number, b"a")
        server.send(number, b"")
        assert await anext(answer) == b"a"
        with pytest.raises(UnavailableError, match="broke off"):
            await asyncio.wait_for(anext(answer), 5)

    run(_Server(), check)


def test_a_reader_that_leaves_is_seen_by_the_server(run: Run) -> None:
    async def check(server: _Server, asker: _Asker) -> None:
        answer, number = await asker.begin(server)
        server.send(number, b"a")
        assert await anext(answer) == b"a"
        await answer.aclose()
        async with asyncio.timeout(10):
            while number not in server.left:
                await asyncio.sleep(0.01)
        # The channel goes on without it.
        server.send(number, b"b")
        other = await asker.ask()
        number = list(server.answers)[-1]
        server.send(number, b"c")
        assert await anext(other) == b"c"

    run(_Server(), check)


def test_a_server_without_channels_answers_all_the_same(run: Run) -> None:
    async def check(server: _Server, asker: _Asker) -> None:
        for _ in range(3):
            answer = await asker.ask()
            assert list(server.answers) == ["none"]
            server.answers["none"].write(b"3\r\nown\r\n0\r\n\r\n")
            assert await answer.read() == b"own"

        assert server.num_refused == 1
        await asker.channel.aclose()
        asker.channel._retry_at = 0.0
        assert (await asker.ask()).status == 200
        assert server.num_refused == 1

    run(_Server(has_channels=False), check)
