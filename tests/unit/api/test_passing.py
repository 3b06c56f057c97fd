"""Pieces that are sent as they come, to clients that read and to some that don't."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from starlette.types import Message

from api.passing import PieceSender


class _Client:
    """A web server's `send`, which waits while its client does not read, or fails."""

    def __init__(self) -> None:
        self.got: list[bytes] = []
        self.reads = asyncio.Event()
        self.reads.set()
        self.fault: Exception | None = None

    async def __call__(self, message: Message) -> None:
        if not self.reads.is_set():
            await self.reads.wait()
        if self.fault is not None:
            raise self.fault
        assert message["more_body"]
        self.got.append(message["body"])


def _run(check: Callable[[_Client, PieceSender], Awaitable[None]]) -> None:
    async def start() -> None:
        client = _Client()
        await check(client, PieceSender(client))

    asyncio.run(start())


def test_a_piece_is_sent_before_the_call_returns() -> None:
    async def check(client: _Client, sender: PieceSender) -> None:
        assert sender.try_send(b"a")
        assert client.got == [b"a"]
        await sender.send(b"b")
        assert client.got == [b"a", b"b"]

    _run(check)


def test_while_a_client_does_not_read_nothing_passes_what_waits() -> None:
    async def check(client: _Client, sender: PieceSender) -> None:
        client.reads.clear()
        assert sender.try_send(b"a")
        assert not sender.try_send(b"b")
        sending = asyncio.ensure_future(sender.send(b"b"))
        await asyncio.sleep(0.01)
        assert client.got == []
        client.reads.set()
        await asyncio.sleep(0)
        assert not sender.try_send(b"c")
        await sending
        assert client.got == [b"a", b"b"]
        assert sender.try_send(b"c")
        assert client.got == [b"a", b"b", b"c"]

    _run(check)


@pytest.mark.parametrize("is_late", [False, True])
def test_what_a_piece_could_not_be_sent_for_is_raised_by_the_next(is_late: bool) -> None:
    async def check(client: _Client, sender: PieceSender) -> None:
        if is_late:
            client.reads.clear()
        client.fault = OSError("gone")
        assert sender.try_send(b"a") is is_late
        client.reads.set()
        with pytest.raises(OSError, match="gone"):
            await sender.send(b"b")
        assert not sender.try_send(b"c")
        with pytest.raises(OSError, match="gone"):
            await sender.drain()
        assert client.got == []

    _run(check)


def test_a_sender_that_is_closed_leaves_nothing_behind() -> None:
    async def check(client: _Client, sender: PieceSender) -> None:
        client.reads.clear()
        assert sender.try_send(b"a")
        sender.close()
        await asyncio.sleep(0.01)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    _run(check)
