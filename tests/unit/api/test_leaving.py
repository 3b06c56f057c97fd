"""Work that ends when its client leaves, and work that does not."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from starlette.types import Message

from api.leaving import UntilLeft


class _Client:
    """A web server's `receive`, after the request's body."""

    def __init__(self) -> None:
        self.leaves = asyncio.Event()

    async def __call__(self) -> Message:
        await self.leaves.wait()
        return {"type": "http.disconnect"}


def _run(check: Callable[[_Client], Awaitable[None]]) -> None:
    async def start() -> None:
        await check(_Client())
        # What is cancelled ends in the loop's next turns.
        await asyncio.sleep(0.01)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(start())


def test_what_waits_ends_when_the_client_leaves_and_is_told_so() -> None:
    async def check(client: _Client) -> None:
        was_told = False
        asyncio.get_running_loop().call_later(0.01, client.leaves.set)
        async with UntilLeft(client):
            try:
                await asyncio.Event().wait()
            finally:
                was_told = True
        assert was_told
        # The task goes on as if nothing had been.
        await asyncio.sleep(0)

    _run(check)


@pytest.mark.parametrize("has_left", [False, True])
def test_a_failure_of_the_work_is_its_own(has_left: bool) -> None:
    async def check(client: _Client) -> None:
        with pytest.raises(ValueError, match="own"):
            async with UntilLeft(client):
                try:
                    if has_left:
                        client.leaves.set()
                        await asyncio.Event().wait()
                finally:
                    raise ValueError("own")

    _run(check)


def test_work_that_is_done_is_done() -> None:
    async def check(client: _Client) -> None:
        async with UntilLeft(client):
            await asyncio.sleep(0)
        client.leaves.set()
        await asyncio.sleep(0)

    _run(check)


@pytest.mark.parametrize("has_left", [False, True])
def test_who_cancels_the_task_is_heard_also_when_the_client_leaves(has_left: bool) -> None:
    async def check(client: _Client) -> None:
        async def work() -> None:
            async with UntilLeft(client):
                await asyncio.Event().wait()

        task = asyncio.create_task(work())
        await asyncio.sleep(0.01)
        if has_left:
            client.leaves.set()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    _run(check)
