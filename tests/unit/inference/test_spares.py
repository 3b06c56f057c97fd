"""Memory for the next adapter: prepared after one was loaded, where there is room, and missed by nobody."""

import asyncio
import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from luthier.inference import spares
from luthier.inference.bases import LoadedBase, pack
from luthier.inference.loaded import LoadedArtifacts
from luthier.inference.spares import Spares
from luthier.modeling import packed_memory
from luthier.modeling.packed_memory import SpareMemory
from tests.unit.inference.artifacts import build_method_artifact, load_plain
from tests.unit.inference.test_foundations import base
from tests.unit.inference.test_loaded import PROBE_IDS, base_folder, make_loaded, served_by

__all__ = ["base", "base_folder"]
MIB = 1 << 20


@pytest.fixture(autouse=True)
def _no_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spares, "_DELAY_SECONDS", 0.0)
    monkeypatch.setattr(packed_memory, "_LEAST_BYTES", 1)
    monkeypatch.setattr(packed_memory, "_REST_SECONDS", 0.0)


async def _loaded(loaded: LoadedArtifacts) -> None:
    await asyncio.wait([entry.loading for entry in loaded._entries.values()])


async def _prepared(kept: Spares) -> None:
    assert kept._preparing is not None
    await asyncio.wait_for(kept._preparing, 10)


def test_memory_is_prepared_piece_by_piece_where_there_is_room() -> None:
    asked: list[int] = []

    @asynccontextmanager
    async def reserving(num_bytes: int) -> AsyncIterator[bool]:
        asked.append(num_bytes)
        yield len(asked) > 1

    async def run() -> None:
        kept, spare = Spares(reserving), SpareMemory()
        spare.take(MIB)
        kept.prepare_soon(spare)
        await _prepared(kept)
        assert (spare.num_bytes, kept.drop()) == (0, 0)
        kept.prepare_soon(spare)
        # One after the other.
        running = kept._preparing
        kept.prepare_soon(spare)
        assert kept._preparing is running
        await _prepared(kept)
        assert kept.num_bytes == spare.num_bytes == 4 * MIB
        assert kept.drop() == 4 * MIB
        assert spare.num_bytes == 0
        assert asked == [MIB] * 5

    asyncio.run(run())


def test_a_system_without_memory_is_told_in_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(_num_bytes: int) -> None:
        raise OSError(errno.ENOMEM, "no memory")

    @asynccontextmanager
    async def reserving(_num_bytes: int) -> AsyncIterator[bool]:
        yield True

    async def run() -> None:
        kept, spare = Spares(reserving), SpareMemory()
        spare.take(MIB)
        monkeypatch.setattr(packed_memory, "take_large", refuse)
        kept.prepare_soon(spare)
        await _prepared(kept)
        assert spare.num_bytes == 0

    asyncio.run(run())
    assert "no memory" in caplog.text


def test_a_loaded_adapter_leaves_memory_for_the_next_which_leaves_before_any_adapter_does(
    tmp_path: Path, base: LoadedBase, base_folder: Path
) -> None:
    tuning = {"type": "lora", "rank": 4}
    packed = pack(load_plain(base_folder), base_folder, PROBE_IDS, max_rows=4, max_cache_tokens=256)
    base, spare = replace(base, packed=packed), packed.spare
    adapters = [
        build_method_artifact(tmp_path / str(seed), base_folder, tuning, seed=seed) for seed in range(2)
    ]

    class Room:
        num_bytes = 10**9
        loaded: LoadedArtifacts

        async def fit(self, num_bytes: int) -> int:
            held = sum(entry.num_bytes for entry in self.loaded._entries.values() if entry.loading.done())
            return held + spare.num_bytes + num_bytes - self.num_bytes

        def has_room(self, num_bytes: int) -> bool:
            held = sum(entry.num_bytes for entry in self.loaded._entries.values() if entry.loading.done())
            return held + spare.num_bytes + num_bytes <= self.num_bytes

    async def run() -> None:
        room = Room()
        room.loaded = make_loaded(10**9, fit=room.fit, has_room=room.has_room)
        room.loaded.release(await room.loaded.hold(served_by(base, adapters[0])))
        await _loaded(room.loaded)
        await _prepared(room.loaded._spares)
        assert spare.num_bytes > 0
        # Room for one more adapter, if nothing is spare.
        [entry] = room.loaded._entries.values()
        room.num_bytes = 2 * entry.num_bytes
        assert room.loaded.idle_bytes == room.loaded.leaving_bytes == entry.num_bytes + spare.num_bytes
        room.loaded.release(await room.loaded.hold(served_by(base, adapters[1])))
        assert len(room.loaded.digests) == 2
        assert spare.num_bytes == 0
        await _loaded(room.loaded)
        # Nor is any prepared while there is no room.
        await _prepared(room.loaded._spares)
        assert spare.num_bytes == 0
        room.num_bytes = 10**9
        room.loaded._spares.prepare_soon(spare)
        await _prepared(room.loaded._spares)
        assert spare.num_bytes > 0
        await room.loaded.give_back(1)
        assert (spare.num_bytes, len(room.loaded.digests)) == (0, 2)

    asyncio.run(run())
