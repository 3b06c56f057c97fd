"""Memory for the next adapter: prepared after one was loaded, where there is room, and missed by nobody."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from luthier.inference import spares
from luthier.inference.bases import LoadedBase, pack
from luthier.inference.loaded import LoadedArtifacts
from luthier.inference.loading import RowLimits
from luthier.inference.spares import Spares
from luthier.modeling import packed_memory
from luthier.modeling.packed_memory import SpareMemory
from tests.unit.inference.artifacts import build_method_artifact, load_plain
from tests.unit.inference.test_foundations import base
from tests.unit.inference.test_loaded import PROBE_IDS, InlineEngine, base_folder, served_by

__all__ = ["base", "base_folder"]
MIB = 1 << 20


@pytest.fixture(autouse=True)
def _no_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spares, "_DELAY_SECONDS", 0.0)
    monkeypatch.setattr(packed_memory, "_LEAST_BYTES", 1)


async def _prepared(kept: Spares) -> None:
    assert kept._preparing is not None
    await asyncio.wait_for(kept._preparing, 10)


def test_memory_is_prepared_where_there_is_room_and_dropped_when_it_is_missed() -> None:
    asked: list[int] = []

    async def has_room(num_bytes: int) -> bool:
        asked.append(num_bytes)
        return len(asked) > 1

    async def run() -> None:
        kept, spare = Spares(), SpareMemory()
        spare.take(MIB)
        kept.prepare_soon(spare, has_room)
        await _prepared(kept)
        assert spare.num_bytes == 0
        assert not kept.drop()
        kept.prepare_soon(spare, has_room)
        # One at a time.
        running = kept._preparing
        kept.prepare_soon(spare, has_room)
        assert kept._preparing is running
        await _prepared(kept)
        assert spare.num_bytes == MIB
        assert kept.drop()
        assert spare.num_bytes == 0
        assert asked == [MIB, MIB]

    asyncio.run(run())


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

    async def run() -> None:
        room = Room()
        room.loaded = LoadedArtifacts(
            InlineEngine(),
            max_whole_bytes=10**9,
            max_adapter_bytes=10**9,
            limits=RowLimits(max_rows=4, max_cache_tokens=256),
            max_waiting=100,
            fit=room.fit,
        )
        room.loaded.release(await room.loaded.hold(served_by(base, adapters[0])))
        await _prepared(room.loaded._spares)
        assert spare.num_bytes > 0
        # Room for one more adapter, if nothing is spare.
        [entry] = room.loaded._entries.values()
        room.num_bytes = 2 * entry.num_bytes
        room.loaded.release(await room.loaded.hold(served_by(base, adapters[1])))
        assert len(room.loaded.digests) == 2
        assert spare.num_bytes == 0

    asyncio.run(run())
