"""Adapters on the tiny base: loaded beside each other, proved first, refused alone, dropped when unused."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from luthier.core.errors import ArtifactCorruptError, SelfCheckError
from luthier.inference.adapters import WEIGHTS_NAME, AdapterSlots
from luthier.inference.copies import drop_unused, fetch_artifact, mark_used
from luthier.storage.manifests import Manifest, seal_folder
from luthier.storage.store import Storage
from tests.tiny import BASE_ID, build_tiny_base
from tests.unit.inference.artifacts import build_artifact, load_plain, load_reference

BASE_DIGEST = "sha256:" + "0" * 64
IDS = torch.tensor([[5, 6, 7, 8]])


@dataclass(frozen=True)
class Artifact:
    digest: str
    folder: Path


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_base(tmp_path_factory.mktemp("bases") / BASE_ID)


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory, base_folder: Path) -> list[Artifact]:
    folder = tmp_path_factory.mktemp("artifacts")
    return [
        Artifact(build_artifact(folder / f"a{seed}", base_folder, seed=seed).digest, folder / f"a{seed}")
        for seed in range(3)
    ]


def make_slots(base_folder: Path, *, max_loaded: int = 16) -> AdapterSlots:
    return AdapterSlots(
        load_plain(base_folder), base_digest=BASE_DIGEST, probe_ids=[5, 6, 7], max_loaded=max_loaded
    )


def logits(module: Any) -> torch.Tensor:
    with torch.inference_mode():
        return module(input_ids=IDS).logits


def reseal(artifact: Artifact, folder: Path, weights: dict[str, torch.Tensor]) -> Artifact:
    building = folder.with_name(f".{folder.name}.building")
    shutil.copytree(artifact.folder, building)
    save_file(weights, building / WEIGHTS_NAME, metadata={"format": "pt"})
    manifest: Manifest = seal_folder(
        building, folder, digested=[WEIGHTS_NAME, "adapter_config.json"], base_digest=BASE_DIGEST
    )
    return Artifact(manifest.digest, folder)


def test_each_adapter_answers_as_in_peft_alone_and_the_base_as_never_wrapped(
    base_folder: Path, artifacts: list[Artifact]
) -> None:
    slots = make_slots(base_folder)
    plain = logits(load_plain(base_folder))
    for artifact in artifacts:
        slots.ensure(artifact, set())
        assert torch.equal(logits(slots.activate(None)), plain)
    for artifact in [*artifacts, *reversed(artifacts)]:
        reference = logits(load_reference(base_folder, artifact.folder))
        assert torch.equal(logits(slots.activate(artifact.digest)), reference)
        assert not torch.equal(reference, plain)
        assert torch.equal(logits(slots.activate(None)), plain)


def test_the_adapter_unused_for_longest_leaves_first(base_folder: Path, artifacts: list[Artifact]) -> None:
    slots = make_slots(base_folder, max_loaded=2)
    first, second, third = artifacts
    slots.ensure(first, set())
    slots.ensure(second, set())
    slots.ensure(first, set())
    slots.ensure(third, set())
    assert slots.loaded == [first.digest, third.digest]
    slots.ensure(second, set())
    reference = logits(load_reference(base_folder, second.folder))
    assert torch.equal(logits(slots.activate(second.digest)), reference)


def test_an_adapter_in_use_never_leaves(base_folder: Path, artifacts: list[Artifact]) -> None:
    slots = make_slots(base_folder, max_loaded=1)
    first, second, _ = artifacts
    slots.ensure(first, set())
    slots.ensure(second, {first.digest})
    assert set(slots.loaded) == {first.digest, second.digest}


def test_an_artifact_of_another_base_is_refused(tmp_path: Path, artifacts: list[Artifact]) -> None:
    other = build_tiny_base(tmp_path / BASE_ID, seed=1)
    slots = AdapterSlots(load_plain(other), base_digest="sha256:" + f"{1:064x}", probe_ids=[5])
    with pytest.raises(ArtifactCorruptError, match="another version of the base"):
        slots.ensure(artifacts[0], set())


def test_an_adapter_that_changes_nothing_is_refused(tmp_path: Path, base_folder: Path) -> None:
    manifest = build_artifact(tmp_path / "idle", base_folder, seed=0, scale=0.0)
    slots = make_slots(base_folder)
    with pytest.raises(SelfCheckError, match="changes nothing"):
        slots.ensure(Artifact(manifest.digest, tmp_path / "idle"), set())
    assert slots.loaded == []
    assert torch.equal(logits(slots.activate(None)), logits(load_plain(base_folder)))


@pytest.mark.parametrize("fault", ["missing", "foreign", "shape", "nan"])
def test_damaged_weights_are_refused_and_harm_no_other_adapter(
    tmp_path: Path, base_folder: Path, artifacts: list[Artifact], fault: str
) -> None:
    weights = load_file(artifacts[0].folder / WEIGHTS_NAME)
    name = next(name for name in weights if "q_proj.lora_B" in name)
    if fault == "missing":
        del weights[name]
    elif fault == "foreign":
        weights[name.replace("layers.0", "layers.7")] = weights[name].clone()
    elif fault == "shape":
        weights[name] = weights[name][:, :2].contiguous()
    else:
        weights[name] = torch.full_like(weights[name], torch.nan)
    bad = reseal(artifacts[0], tmp_path / "bad", weights)
    slots = make_slots(base_folder)
    with pytest.raises((ArtifactCorruptError, SelfCheckError)):
        slots.ensure(bad, set())
    plain = logits(load_plain(base_folder))
    assert torch.equal(logits(slots.activate(None)), plain)
    slots.ensure(artifacts[1], set())
    with pytest.raises((ArtifactCorruptError, SelfCheckError)):
        slots.ensure(bad, {artifacts[1].digest})
    reference = logits(load_reference(base_folder, artifacts[1].folder))
    assert torch.equal(logits(slots.activate(artifacts[1].digest)), reference)
    assert slots.loaded == [artifacts[1].digest]


def test_an_artifact_is_fetched_once_and_again_when_its_copy_is_damaged(
    tmp_path: Path, artifacts: list[Artifact]
) -> None:
    storage = Storage.open(f"file://{tmp_path}/objects")
    storage.put_folder(artifacts[0].folder, "projects/p/a")
    digest = artifacts[0].digest
    folder = fetch_artifact(storage, "projects/p/a", digest, tmp_path / "cache")
    content = (folder / WEIGHTS_NAME).read_bytes()
    storage.delete_prefix("projects/p/a")
    assert fetch_artifact(storage, "projects/p/a", digest, tmp_path / "cache") == folder
    (folder / WEIGHTS_NAME).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    storage.put_folder(artifacts[0].folder, "projects/p/a")
    assert fetch_artifact(storage, "projects/p/a", digest, tmp_path / "cache") == folder
    assert (folder / WEIGHTS_NAME).read_bytes() == content


def test_another_artifact_under_the_same_key_is_never_taken_for_it(
    tmp_path: Path, artifacts: list[Artifact]
) -> None:
    storage = Storage.open(f"file://{tmp_path}/objects")
    storage.put_folder(artifacts[1].folder, "projects/p/a")
    with pytest.raises(ArtifactCorruptError):
        fetch_artifact(storage, "projects/p/a", artifacts[0].digest, tmp_path / "cache")
    with pytest.raises(ArtifactCorruptError):
        fetch_artifact(storage, "projects/p/a", "../../etc", tmp_path / "cache")


def test_the_copies_unused_for_longest_leave_and_those_in_use_never(tmp_path: Path) -> None:
    names = [f"{i:064x}" for i in range(5)]
    for i, name in enumerate(names):
        (tmp_path / name).mkdir()
        (tmp_path / name / "f").touch()
        os.utime(tmp_path / name, (1000 + i, 1000 + i))
    mark_used(tmp_path / names[1])
    drop_unused(tmp_path, max_kept=3, in_use={f"sha256:{names[0]}"})
    assert {path.name for path in tmp_path.iterdir()} == {names[0], names[1], names[4]}
    drop_unused(tmp_path, max_kept=1, in_use={f"sha256:{name}" for name in names})
    assert len(list(tmp_path.iterdir())) == 3
