"""Adapters of one recipe are laid out as the first of them was, and each is checked as the first is."""

import asyncio
import json
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from luthier.bases.catalogue import FACTS_NAME
from luthier.core.errors import ArtifactCorruptError, SelfCheckError
from luthier.core.specs import BaseFacts
from luthier.inference import loading
from luthier.inference.bases import PackedWeights, pack
from luthier.inference.copies import Copy, _copy_in
from luthier.inference.loading import Kind, RowLimits
from luthier.methods import method_of_artifact
from luthier.modeling import kernels
from luthier.modeling.alike import Layout
from luthier.modeling.packed_adapter import PackedAdapter, lay_out
from luthier.modeling.packed_work import Stretch
from luthier.storage.manifests import read_manifest, seal_folder
from tests.tiny import BASE_ID, build_tiny_base
from tests.unit.inference.artifacts import WEIGHTS_NAME, build_method_artifact, load_plain

pytestmark = pytest.mark.skipif(
    not kernels.is_compiled(torch.empty(1)), reason="without numba every adapter is laid out by itself"
)
LORA = {"type": "lora", "rank": 4}


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_base(tmp_path_factory.mktemp("bases") / BASE_ID)


@pytest.fixture
def packed(base_folder: Path) -> PackedWeights:
    return pack(load_plain(base_folder), base_folder, [5, 6, 7], max_rows=2, max_cache_tokens=256)


class Engine:
    """Does what it is asked at once, and counts."""

    def __init__(self) -> None:
        self.num_calls = 0

    def call(self, work: Callable[[], Any]) -> Future[Any]:
        self.num_calls += 1
        future: Future[Any] = Future()
        try:
            future.set_result(work())
        except Exception as error:  # noqa: BLE001 - whoever waits gets it
            future.set_exception(error)
        return future


def load(packed: PackedWeights, base_folder: Path, copy: Copy, engine: Any) -> PackedAdapter:
    facts = BaseFacts.model_validate_json((base_folder / FACTS_NAME).read_bytes())
    served: Any = SimpleNamespace(
        copy=copy, copies=(copy,), base=SimpleNamespace(facts=facts, probe_ids=[5, 6, 7])
    )
    served.base.packed = packed
    limits, laid = RowLimits(max_rows=1, max_cache_tokens=1), []
    ready = asyncio.run(
        loading.load(engine, served, Kind.PACKED, limits, opening=nullcontext, on_laid=laid.append)
    )
    assert laid == [ready] and ready.adapter is not None
    return ready.adapter


def change(
    base_folder: Path,
    folder: Path,
    target: Path,
    *,
    weights: Any = None,
    config: dict[str, Any] | None = None,
) -> Path:
    """Seal a copy of an artifact with other numbers, or another configuration."""
    building = target.with_name(f".{target.name}")
    building.mkdir()
    names = sorted(read_manifest(folder).files)
    for name in names:
        (building / name).write_bytes((folder / name).read_bytes())
    if weights is not None:
        tensors = load_file(folder / WEIGHTS_NAME)
        weights(tensors)
        save_file(tensors, building / WEIGHTS_NAME, metadata={"format": "pt"})
    if config is not None:
        path = building / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config, indent=2, sort_keys=True) + "\n")
    facts = BaseFacts.model_validate_json((base_folder / FACTS_NAME).read_bytes())
    seal_folder(building, target, digested=names, base_digest=facts.digest)
    return target


def logits_of(packed: PackedWeights, adapter: PackedAdapter) -> torch.Tensor:
    step = packed.lane.model.step([Stretch([5, 6, 7, 8], 0, [1], adapter.described)])
    return step.held_RV.clone()


def as_first(packed: PackedWeights, folder: Path) -> PackedAdapter:
    parts = method_of_artifact(folder).read_parts(folder, packed.shape)
    assert parts is not None
    nothing: Any = None
    return lay_out(parts, packed.lane.model, nothing)


@pytest.fixture
def num_laid(monkeypatch: pytest.MonkeyPatch) -> list[Layout]:
    """Collects the layouts that are used, one for each use."""
    lay, used = Layout.lay, []

    def count(self: Layout, *arguments: Any) -> Any:
        used.append(self)
        return lay(self, *arguments)

    monkeypatch.setattr(Layout, "lay", count)
    return used


def test_only_what_is_alike_in_all_but_its_numbers_is_laid_out_as_another(
    packed: PackedWeights, base_folder: Path, tmp_path: Path, num_laid: list[Layout]
) -> None:
    first = build_method_artifact(tmp_path / "a", base_folder, LORA, seed=1).folder
    second = build_method_artifact(tmp_path / "b", base_folder, LORA, seed=2).folder
    louder = change(base_folder, second, tmp_path / "c", config={"lora_alpha": 64})
    wider = build_method_artifact(tmp_path / "d", base_folder, {"type": "lora", "rank": 8}, seed=3).folder
    engine = Engine()
    for number, (folder, uses) in enumerate([(first, 0), (second, 1), (louder, 1), (wider, 1), (first, 2)]):
        adapter = load(packed, base_folder, _copy_in(folder), engine)
        assert len(num_laid) == uses
        assert engine.num_calls == number + 1
        assert torch.equal(logits_of(packed, adapter), logits_of(packed, as_first(packed, folder)))


@pytest.mark.parametrize("is_first", [True, False])
def test_numbers_that_are_not_finite_are_refused_first_or_not(
    packed: PackedWeights, base_folder: Path, tmp_path: Path, num_laid: list[Layout], is_first: bool
) -> None:
    good = build_method_artifact(tmp_path / "a", base_folder, LORA, seed=1).folder

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[sorted(tensors)[-1]].view(-1)[-1] = float("inf")

    bad, engine = change(base_folder, good, tmp_path / "b", weights=spoil), Engine()
    if not is_first:
        load(packed, base_folder, _copy_in(good), engine)
    with pytest.raises(SelfCheckError, match="not finite"):
        load(packed, base_folder, _copy_in(bad), engine)
    assert len(num_laid) == int(not is_first)
    # Nobody else's layout is harmed.
    load(packed, base_folder, _copy_in(good), engine)


def test_a_file_with_another_hash_is_never_run_and_leaves_no_layout(
    packed: PackedWeights, base_folder: Path, tmp_path: Path
) -> None:
    folder = build_method_artifact(tmp_path / "a", base_folder, LORA, seed=1).folder
    copy, engine = _copy_in(folder), Engine()
    content = bytearray((folder / WEIGHTS_NAME).read_bytes())
    content[-1] ^= 1
    (folder / WEIGHTS_NAME).write_bytes(content)
    with pytest.raises(ArtifactCorruptError):
        load(packed, base_folder, copy, engine)
    assert engine.num_calls == 0
    assert not packed.layouts._found


@pytest.mark.parametrize("cut", [1, 400])
def test_a_shorter_file_with_the_same_header_is_refused(
    packed: PackedWeights, base_folder: Path, tmp_path: Path, num_laid: list[Layout], cut: int
) -> None:
    good = build_method_artifact(tmp_path / "a", base_folder, LORA, seed=1).folder
    other = build_method_artifact(tmp_path / "b", base_folder, LORA, seed=2).folder
    engine = Engine()
    load(packed, base_folder, _copy_in(good), engine)
    copy = _copy_in(other)
    (other / WEIGHTS_NAME).write_bytes((other / WEIGHTS_NAME).read_bytes()[:-cut])
    with pytest.raises(ArtifactCorruptError):
        load(packed, base_folder, copy, engine)
    assert not num_laid
