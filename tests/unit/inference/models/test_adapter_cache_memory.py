"""Artifacts below the limit of the process: idle ones leave, held and pinned ones never, and who waits."""

import asyncio

import pytest
import torch

from luthier.inference.models.base_models import LoadedBase
from luthier.inference.models.loading import measure_weights
from luthier.inference.models.memory_limit import NoRoomError
from tests.unit.inference.artifacts import Artifact
from tests.unit.inference.models.test_adapter_cache import (
    base,
    base_folder,
    make_loaded,
    served_by,
    settle,
    wholes,
)

__all__ = ["base", "base_folder", "wholes"]


class Room:
    """A process in which so many bytes are left beside its artifacts, as `MemoryLimit.fit` returns it."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self.loaded = make_loaded(10**9, fit=self._fit)

    async def _fit(self, num_bytes: int) -> int:
        await asyncio.sleep(0)
        entries = self.loaded._entries.values()
        held = sum(entry.num_bytes for entry in entries if entry.loading.done())
        return held + num_bytes - self.num_bytes


def _size(artifact: Artifact) -> int:
    return measure_weights(artifact.folder, torch.float32)


def test_idle_artifacts_are_given_back_and_held_and_pinned_ones_kept(
    base: LoadedBase,
    wholes: list[Artifact],
) -> None:
    async def run() -> None:
        loaded = Room(10**9).loaded
        held, idle, pinned = (served_by(base, artifact) for artifact in wholes)
        await loaded.hold(held)
        loaded.release(await loaded.hold(idle))
        loaded.release(await loaded.hold(pinned, pinned_by="p"))
        await loaded.give_back(10**9)
        assert loaded.digests == [held.digest, pinned.digest]
        assert loaded.leaving_bytes == _size(wholes[0])

    asyncio.run(run())


def test_a_whole_model_that_would_pass_the_limit_waits_or_is_refused(
    base: LoadedBase,
    wholes: list[Artifact],
) -> None:
    size = _size(wholes[0])

    async def run() -> None:
        # Twice its size while it is laid out.
        room = Room(3 * size)
        loaded = room.loaded
        first, second, third = (served_by(base, artifact) for artifact in wholes)
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
        assert (refused.value.code, refused.value.http_status, refused.value.retryable) == (
            "out_of_memory",
            503,
            True,
        )
        # Nobody has left for it in vain.
        assert loaded.digests == [first.digest, third.digest]

    asyncio.run(run())


def test_no_model_leaves_for_another_ones_verification(base: LoadedBase, wholes: list[Artifact]) -> None:
    size = _size(wholes[0])

    async def run() -> None:
        loaded = Room(2 * size).loaded
        idle = served_by(base, wholes[0])
        loaded.release(await loaded.hold(idle))
        with pytest.raises(NoRoomError):
            async with loaded._spare(2 * size):
                pass
        async with loaded._spare(size):
            assert loaded.loading_bytes == size
        assert loaded.digests == [idle.digest]

    asyncio.run(run())


def test_who_waits_for_room_looks_again_when_the_limit_rises(
    base: LoadedBase,
    wholes: list[Artifact],
) -> None:
    size = _size(wholes[0])

    async def run() -> None:
        room = Room(2 * size)
        first, second = (served_by(base, artifact) for artifact in wholes[:2])
        await room.loaded.hold(first)
        waiting = asyncio.create_task(room.loaded.hold(second))
        await settle()
        assert not waiting.done()
        room.num_bytes = 3 * size
        room.loaded.wake()
        await waiting

    asyncio.run(run())


def test_two_who_look_for_room_at_once_do_not_both_take_it() -> None:
    async def run() -> list[bool]:
        loaded = Room(100).loaded

        async def load(num_bytes: int) -> bool:
            try:
                has_room = await loaded.make_way(num_bytes)
            except NoRoomError:
                return False
            with loaded.expecting(num_bytes):
                await settle()
            return has_room

        found = list(await asyncio.gather(load(60), load(50), load(40)))
        assert loaded.loading_bytes == 0
        return found

    assert asyncio.run(run()) == [True, False, True]
