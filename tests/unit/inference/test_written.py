import asyncio
from collections.abc import Awaitable, Callable

import pytest
from starlette.types import Message

from luthier.inference.written import ResponseOutlet, WrittenStream


class Client:
    """Takes what a response sends; reads nothing while it is paused."""

    def __init__(self) -> None:
        self.sent: list[Message] = []
        self.reads = asyncio.Event()
        self.reads.set()
        self.has_left = asyncio.Event()
        self.fault: Exception | None = None

    async def send(self, message: Message) -> None:
        if not self.reads.is_set():
            await self.reads.wait()
        if self.fault is not None:
            raise self.fault
        self.sent.append(message)

    async def receive(self) -> Message:
        await self.has_left.wait()
        return {"type": "http.disconnect"}

    @property
    def body(self) -> bytes:
        return b"".join(one.get("body", b"") for one in self.sent)


async def answer(client: Client, write: Callable[[ResponseOutlet], Awaitable[None]]) -> list[str]:
    """Send a stream to its end; return what was called at the end."""
    closed: list[str] = []
    stream = WrittenStream(write, {"x-own": "1"}, lambda: closed.append("closed"))
    await stream({"type": "http", "method": "POST", "headers": []}, client.receive, client.send)
    return closed


def test_pieces_are_sent_in_the_turn_in_which_they_are_written() -> None:
    async def check() -> None:
        client = Client()
        seen: list[bytes] = []

        async def write(outlet: ResponseOutlet) -> None:
            for piece in (b"a", b"", b"b"):
                outlet.write(piece)
                seen.append(client.body)

        assert await answer(client, write) == ["closed"]
        assert seen == [b"a", b"a", b"ab"]
        first, *pieces, last = client.sent
        assert first["status"] == 200
        headers = dict(first["headers"])
        assert headers[b"content-type"].startswith(b"text/event-stream")
        assert headers[b"x-own"] == b"1"
        assert b"content-length" not in headers
        assert [one["body"] for one in pieces] == [b"a", b"b"]
        assert last == {"type": "http.response.body", "body": b"", "more_body": False}

    asyncio.run(check())


def test_a_client_that_does_not_read_gets_all_in_order_when_it_does() -> None:
    async def check() -> None:
        client = Client()

        async def write(outlet: ResponseOutlet) -> None:
            outlet.write(b"0 ")
            client.reads.clear()
            for number in range(1, 6):
                outlet.write(b"%d " % number)
                await asyncio.sleep(0)
            assert client.body == b"0 "
            client.reads.set()
            await asyncio.sleep(0.01)
            assert client.body == b"0 1 2 3 4 5 "
            # Whoever reads again is written to at once again.
            outlet.write(b"6 ")
            assert client.body == b"0 1 2 3 4 5 6 "
            client.reads.clear()
            outlet.write(b"7 ")
            asyncio.get_running_loop().call_later(0.01, client.reads.set)

        assert await answer(client, write) == ["closed"]
        assert client.body == b"0 1 2 3 4 5 6 7 "
        assert client.sent[-1]["more_body"] is False

    asyncio.run(check())


@pytest.mark.parametrize("is_reading", [True, False])
def test_a_client_that_leaves_ends_the_stream(is_reading: bool) -> None:
    async def check() -> None:
        client = Client()
        was_cancelled = False

        async def write(outlet: ResponseOutlet) -> None:
            nonlocal was_cancelled
            if not is_reading:
                client.reads.clear()
            outlet.write(b"piece")
            client.has_left.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                was_cancelled = True
                raise

        async with asyncio.timeout(5):
            assert await answer(client, write) == ["closed"]
            # What still waited for the client is given up.
            while len(asyncio.all_tasks()) > 1:
                await asyncio.sleep(0)
        assert was_cancelled
        assert all(one.get("more_body", True) for one in client.sent)

    asyncio.run(check())


@pytest.mark.parametrize("is_late", [True, False])
def test_what_the_server_fails_with_ends_this_stream_and_is_told(is_late: bool) -> None:
    async def check() -> None:
        client = Client()

        async def write(outlet: ResponseOutlet) -> None:
            client.fault = OSError("broken")
            if is_late:
                client.reads.clear()
            with outlet.ending() as end:
                # Others are written to in the same turn: it never raises.
                outlet.write(b"piece")
                assert end.is_set() == (not is_late)
                client.reads.set()
                await end.wait()
                outlet.write(b"more")
                assert outlet._held == []

        closed: list[str] = []
        stream = WrittenStream(write, {}, lambda: closed.append("closed"))
        with pytest.raises(OSError, match="broken"):
            await stream({"type": "http", "method": "POST", "headers": []}, client.receive, client.send)
        assert closed == ["closed"]

    asyncio.run(check())
