"""What stays in memory: held artifacts always; the one unused for longest leaves first; none overtakes."""

import asyncio
import gc
import shutil
import weakref
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from luthier.core.errors import ArtifactCorruptError, OutOfMemoryError, SelfCheckError, TooManyRequestsError
from luthier.inference.engine.engine import Engine
from luthier.inference.models.adapter_cache import AdapterCache, CacheStats
from luthier.inference.models.artifact_cache import verify_copy
from luthier.inference.models.base_models import LoadedBase, ReadyModel, ServedModel
from luthier.inference.models.loading import Kind, measure_weights
from luthier.methods import discover
from luthier.storage.manifests import read_manifest, seal_folder
from tests.unit.inference.artifacts import BUDGET, Artifact, build_method_artifact, damage, load_tiny

pytestmark = pytest.mark.anyio

WHOLE = [name for name, method in discover().items() if method.is_whole_model]


class InlineEngine(Engine):
    """Does at once what it is asked, and counts the sweeps."""

    def __init__(self) -> None:
        super().__init__(max_waiting=9)
        self.num_sweeps = 0

    def call(self, work: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(work())
        except Exception as error:  # noqa: BLE001 - as the engine does
            future.set_exception(error)
        return future

    def sweep(self) -> Future[None]:
        self.num_sweeps += 1
        return self.call(lambda: None)


def build(folder: Path, base_folder: Path, **tuning: Any) -> list[Artifact]:
    return [build_method_artifact(folder / f"a{i}", base_folder, tuning, seed=i) for i in range(3)]


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory, base_folder: Path) -> list[Artifact]:
    return build(tmp_path_factory.mktemp("loras"), base_folder, type="lora", rank=2)


@pytest.fixture(scope="module")
def wholes(tmp_path_factory: pytest.TempPathFactory, base_folder: Path) -> list[Artifact]:
    return build(tmp_path_factory.mktemp("wholes"), base_folder, type=WHOLE[0])


@pytest.fixture
def size(wholes: list[Artifact]) -> int:
    """The bytes of each whole model in memory."""
    return measure_weights(wholes[0].folder, torch.float32)


@pytest.fixture
def base(base_folder: Path) -> LoadedBase:
    return load_tiny(base_folder)


async def fit_anything(_num_bytes: int) -> int:
    """Find room for whatever comes."""
    return 0


def make_loaded(
    max_whole_bytes: int,
    *,
    engine: InlineEngine | None = None,
    fit: Callable[[int], Awaitable[int]] = fit_anything,
    **limits: int,
) -> AdapterCache:
    return AdapterCache(
        engine or InlineEngine(),
        max_whole_bytes=max_whole_bytes,
        max_pinned_share=1.0,
        budget=BUDGET,
        fit=fit,
        **({"max_waiting": 100, "max_adapter_bytes": 10**9} | limits),
    )


def served_by(base: LoadedBase, artifact: Artifact) -> ServedModel:
    return ServedModel(base, artifact.digest, verify_copy(artifact.folder))


@pytest.fixture
def served(base: LoadedBase, wholes: list[Artifact]) -> list[ServedModel]:
    """Three whole models."""
    return [served_by(base, artifact) for artifact in wholes]


async def settle() -> None:
    """Let everything happen that can happen now, threads included."""
    for _ in range(30):
        await asyncio.sleep(0.01)


async def test_the_adapter_unused_for_longest_leaves_first_and_a_held_one_never(base, loras):
    loaded = make_loaded(0, max_adapter_bytes=2 * measure_weights(loras[0].folder, torch.float32))
    first, second, third = (served_by(base, artifact) for artifact in loras)
    held = [await loaded.hold(first), await loaded.hold(second)]
    waiting = asyncio.create_task(loaded.hold(third))
    await settle()
    assert not waiting.done() and loaded.digests == [first.digest, second.digest]
    loaded.release(held[0])
    loaded.release(await waiting)
    assert loaded.digests == [second.digest, third.digest]
    loaded.release(held[1])
    loaded.release(await loaded.hold(second))
    loaded.release(await loaded.hold(first))
    assert loaded.digests == [second.digest, first.digest]


async def test_the_bare_base_is_always_there(base):
    loaded = make_loaded(0)
    ready = await loaded.hold(ServedModel(base))
    assert (ready.executor, ready.adapter, loaded.digests) == (base.executor, None, [])
    loaded.release(ready)


async def test_requests_for_a_model_that_is_loading_share_the_loading(served):
    loaded = make_loaded(10**9)
    one, two = await asyncio.gather(loaded.hold(served[0]), loaded.hold(served[0]))
    assert one is two


async def test_whole_models_stay_within_their_memory_in_turn(served, size):
    engine = InlineEngine()
    loaded = make_loaded(2 * size, engine=engine)
    first, second, third = served
    ready_first, ready_second = await loaded.hold(first), await loaded.hold(second)
    waiting = asyncio.create_task(loaded.hold(third))
    await settle()
    assert not waiting.done() and loaded.num_bytes(Kind.WHOLE) == 2 * size
    overtaking = asyncio.create_task(loaded.hold(second))
    await settle()
    assert not overtaking.done()
    # Weights are gone, not only forgotten, before others take their place.
    weights = weakref.ref(ready_second.executor)
    loaded.release(ready_second)
    del ready_second
    third_ready = await waiting
    gc.collect()
    assert weights() is None
    assert engine.num_sweeps > 0
    assert loaded.digests == [first.digest, third.digest]
    assert not overtaking.done()
    loaded.release(third_ready)
    loaded.release(await overtaking)
    assert loaded.digests == [first.digest, second.digest]
    assert ready_first.executor is (await loaded.hold(first)).executor
    stats = loaded.stats(Kind.WHOLE)
    # The first three, then the second again; the second and the third left for each other.
    assert stats == CacheStats(2, 2 * size, 2 * size, num_loads=4, num_evictions=2)
    assert loaded.stats(Kind.PACKED).num_loads == 0


async def test_a_whole_model_larger_than_all_memory_is_refused(served, size):
    loaded = make_loaded(size - 1)
    with pytest.raises(OutOfMemoryError, match="LUTHIER_INFERENCE_MAX_WHOLE_MODELS_BYTES"):
        await loaded.hold(served[0])
    assert loaded.digests == []


async def test_a_client_that_leaves_during_loading_holds_nothing(served, size):
    loaded = make_loaded(size)
    first, second, _ = served
    leaving = asyncio.create_task(loaded.hold(first))
    while not loaded.digests:
        await asyncio.sleep(0)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    held = await loaded.hold(second)
    waiting = asyncio.create_task(loaded.hold(first))
    await settle()
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    # The place in the queue went with its owner.
    loaded.release(held)
    assert (await asyncio.wait_for(loaded.hold(second), 10)).executor is held.executor


async def test_no_more_requests_wait_for_models_than_may_and_those_for_models_in_memory_are_served(
    base, served, loras
):
    loaded = make_loaded(10**9, max_waiting=2)
    whole, lora = served[0], served_by(base, loras[0])
    await loaded.hold(lora)
    waiting = [asyncio.create_task(loaded.hold(whole)) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(TooManyRequestsError, match="2 requests"):
        await loaded.hold(whole)
    await loaded.hold(lora)
    await asyncio.gather(*waiting)
    await loaded.hold(whole)


@pytest.mark.parametrize("fault", ["missing", "foreign", "shape", "nan", "other base", "unchanged"])
async def test_a_whole_model_that_proves_nothing_is_refused_and_forgotten(
    tmp_path, base, base_folder, wholes, fault
):
    if fault == "unchanged":
        tuning = {"type": WHOLE[0]}
        bad = build_method_artifact(tmp_path / "a", base_folder, tuning, seed=0, scale=0.0)
    else:
        bad = damage(wholes[0], tmp_path / "a", fault)
    expected = SelfCheckError if fault in {"nan", "unchanged"} else ArtifactCorruptError

    loaded = make_loaded(10**9)
    for _ in range(2):
        with pytest.raises(expected):
            await loaded.hold(served_by(base, bad))
        assert (loaded.digests, loaded.num_bytes(Kind.WHOLE)) == ([], 0)
    ready: ReadyModel = await loaded.hold(served_by(base, wholes[0]))
    assert ready.has_own_weights


async def test_a_whole_model_in_bf16_is_served_in_the_type_of_its_base(tmp_path, base, wholes):
    building = tmp_path / ".a"
    shutil.copytree(wholes[0].folder, building)
    weights = {k: v.bfloat16() for k, v in load_file(building / "model.safetensors").items()}
    save_file(weights, building / "model.safetensors", metadata={"format": "pt"})
    config = (building / "config.json").read_text().replace('"float32"', '"bfloat16"')
    assert "bfloat16" in config
    (building / "config.json").write_text(config)
    manifest = read_manifest(wholes[0].folder)
    sealed = seal_folder(
        building, tmp_path / "a", digested=manifest.digested, base_digest=manifest.base_digest
    )

    loaded = make_loaded(10**9)
    ready = await loaded.hold(served_by(base, Artifact(sealed.digest, tmp_path / "a")))
    assert ready.executor.runner.limits.dtype == "float32"
    # Memory is that of the served type, not that of the file.
    assert loaded.num_bytes(Kind.WHOLE) == 4 * sum(weight.numel() for weight in weights.values())


async def test_a_pinned_model_never_leaves_for_another(served, size):
    loaded = make_loaded(2 * size)
    first, second, third = served
    loaded.release(await loaded.hold(first, pinned_by="p"))
    for other in (second, third, second):
        loaded.release(await loaded.hold(other))
        assert loaded.digests == [first.digest, other.digest]
    loaded.release(await loaded.hold(second, pinned_by="p"))
    with pytest.raises(OutOfMemoryError, match="Unpin"):
        await loaded.hold(third)
    loaded.release(await loaded.hold(first))
    loaded.release(await loaded.hold(third))
    assert loaded.digests == [second.digest, third.digest]
