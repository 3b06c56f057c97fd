"""Artifacts below the limit of the process: idle ones leave, held and pinned ones never, and who waits."""

import asyncio

import pytest

from luthier.inference.models.memory_limit import NoRoomError
from tests.unit.inference.models.test_adapter_cache import base, make_loaded, served, settle, size, wholes

__all__ = ["base", "served", "size", "wholes"]

pytestmark = pytest.mark.anyio


class Room:
    """A process in which `num_bytes` are left beside its artifacts, as `MemoryLimit.fit` returns it."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self.loaded = make_loaded(10**9, fit=self._fit)

    async def _fit(self, num_bytes: int) -> int:
        await asyncio.sleep(0)
        entries = self.loaded._entries.values()
        held = sum(entry.num_bytes for entry in entries if entry.loading.done())
        return held + num_bytes - self.num_bytes


async def test_idle_artifacts_are_given_back_and_held_and_pinned_ones_kept(served, size):
    loaded = Room(10**9).loaded
    held, idle, pinned = served
    await loaded.hold(held)
    loaded.release(await loaded.hold(idle))
    loaded.release(await loaded.hold(pinned, pinned_by="p"))
    await loaded.give_back(10**9)
    assert loaded.digests == [held.digest, pinned.digest]
    assert loaded.leaving_bytes == size


async def test_a_whole_model_that_would_pass_the_limit_waits_or_is_refused(served, size):
    # Twice its size while it is packed.
    room = Room(3 * size)
    loaded = room.loaded
    first, second, third = served
    ready = [await loaded.hold(first), await loaded.hold(second)]
    waiting = asyncio.create_task(loaded.hold(third))
    await settle()
    assert not waiting.done()
    loaded.release(ready.pop())
    loaded.release(await waiting)
    assert loaded.digests == [first.digest, third.digest]
    room.num_bytes = size
    with pytest.raises(NoRoomError) as refused:
        await loaded.hold(second)
    error = refused.value
    assert (error.code, error.http_status, error.retryable) == ("out_of_memory", 503, True)
    # None has left for it in vain.
    assert loaded.digests == [first.digest, third.digest]


async def test_no_model_leaves_for_another_ones_verification(served, size):
    loaded = Room(2 * size).loaded
    idle = served[0]
    loaded.release(await loaded.hold(idle))
    with pytest.raises(NoRoomError):
        async with loaded._spare(2 * size):
            pass
    async with loaded._spare(size):
        assert loaded.loading_bytes == size
    assert loaded.digests == [idle.digest]


async def test_who_waits_for_room_looks_again_when_the_limit_rises(served, size):
    room = Room(2 * size)
    first, second = served[:2]
    await room.loaded.hold(first)
    waiting = asyncio.create_task(room.loaded.hold(second))
    await settle()
    assert not waiting.done()
    room.num_bytes = 3 * size
    room.loaded.wake()
    await waiting


async def test_two_who_look_for_room_at_once_do_not_both_take_it():
    loaded = Room(100).loaded

    async def load(num_bytes: int) -> bool:
        try:
            has_room = await loaded.make_way(num_bytes)
        except NoRoomError:
            return False
        with loaded.expecting(num_bytes):
            await settle()
        return has_room

    assert await asyncio.gather(load(60), load(50), load(40)) == [True, False, True]
    assert loaded.loading_bytes == 0
