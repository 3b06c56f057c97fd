"""Artifacts of every method on the tiny base: laid beside each other, proved first, refused alone."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from luthier.core.errors import ArtifactCorruptError, SelfCheckError
from luthier.inference.forward import run_prompts
from luthier.inference.slots import ArtifactSlots
from luthier.methods import discover
from luthier.modeling.load import load_base
from luthier.storage.manifests import read_manifest, seal_folder
from tests.tiny import BASE_ID, build_tiny_base
from tests.unit.inference.artifacts import (
    Artifact,
    all_tunings,
    build_artifact,
    build_method_artifact,
    load_plain,
    load_reference,
    method_logits,
    tuning_name,
)

BASE_DIGEST = "sha256:" + "0" * 64
IDS = [5, 6, 7, 8]
INSTALLABLE = [tuning for tuning in all_tunings() if not discover()[tuning["type"]].is_whole_model]


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_base(tmp_path_factory.mktemp("bases") / BASE_ID)


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory, base_folder: Path) -> dict[str, Artifact]:
    folder = tmp_path_factory.mktemp("artifacts")
    return {
        tuning_name(tuning): build_method_artifact(folder / f"a{i}", base_folder, tuning, seed=i)
        for i, tuning in enumerate(INSTALLABLE)
    }


def make_slots(base_folder: Path) -> ArtifactSlots:
    return ArtifactSlots(load_plain(base_folder), base_digest=BASE_DIGEST, probe_ids=[5, 6, 7])


@torch.inference_mode()
def last_logits(slots: ArtifactSlots, artifact: Artifact | None) -> torch.Tensor:
    prefix = slots.install(artifact.digest, artifact.folder) if artifact else ()
    _, logits_1V = run_prompts(slots.activate(artifact.digest if artifact else None), [IDS], prefix)
    return logits_1V[0]


@torch.inference_mode()
def plain_logits(base_folder: Path) -> torch.Tensor:
    """Return what a base says that never bore anything."""
    _, logits_1V = run_prompts(load_plain(base_folder), [IDS], ())
    return logits_1V[0]


def reseal(artifact: Artifact, folder: Path, weights: dict[str, torch.Tensor], name: str) -> Artifact:
    building = folder.with_name(f".{folder.name}.building")
    shutil.copytree(artifact.folder, building)
    save_file(weights, building / name, metadata={"format": "pt"})
    digested = read_manifest(artifact.folder).digested
    return Artifact(seal_folder(building, folder, digested=digested, base_digest=BASE_DIGEST).digest, folder)


def test_every_artifact_answers_as_its_method_loads_it_and_the_base_as_if_there_were_none(
    base_folder: Path, artifacts: dict[str, Artifact]
) -> None:
    slots, plain = make_slots(base_folder), plain_logits(base_folder)
    for artifact in artifacts.values():
        slots.install(artifact.digest, artifact.folder)
        assert torch.equal(last_logits(slots, None), plain)
    for artifact in [*artifacts.values(), *reversed(artifacts.values())]:
        reference = method_logits(base_folder, artifact.folder, IDS)[-1]
        torch.testing.assert_close(last_logits(slots, artifact), reference, rtol=0, atol=1e-5)
        assert not torch.allclose(reference, plain, atol=1e-3)
        assert torch.equal(last_logits(slots, None), plain)


def test_taking_artifacts_off_leaves_the_others_and_the_base_as_they_were(
    base_folder: Path, artifacts: dict[str, Artifact]
) -> None:
    slots, plain = make_slots(base_folder), plain_logits(base_folder)
    before = {name: last_logits(slots, artifact) for name, artifact in artifacts.items()}
    for name in list(artifacts):
        # Once while it is on, once while it is off.
        slots.remove(artifacts[name].digest)
        assert artifacts[name].digest not in slots.installed
        assert torch.equal(last_logits(slots, None), plain)
        for other, artifact in artifacts.items():
            assert torch.equal(last_logits(slots, artifact), before[other])
    for artifact in artifacts.values():
        slots.remove(artifact.digest)
    fresh = load_plain(base_folder)
    module = slots.activate(None)
    assert [name for name, _ in module.named_modules()] == [name for name, _ in fresh.named_modules()]
    assert [name for name, _ in module.named_parameters()] == [name for name, _ in fresh.named_parameters()]
    for (_, one), (_, other) in zip(module.named_parameters(), fresh.named_parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_lora_artifact_answers_bit_for_bit_as_in_peft_alone(tmp_path: Path, base_folder: Path) -> None:
    manifest = build_artifact(tmp_path / "a", base_folder, seed=0)
    slots = make_slots(base_folder)
    slots.install(manifest.digest, tmp_path / "a")
    ids_1T = torch.tensor([IDS])
    with torch.inference_mode():
        reference = load_reference(base_folder, tmp_path / "a")(input_ids=ids_1T).logits
        assert torch.equal(slots.activate(manifest.digest)(input_ids=ids_1T).logits, reference)


def test_an_artifact_of_another_base_is_refused(tmp_path: Path, artifacts: dict[str, Artifact]) -> None:
    other = build_tiny_base(tmp_path / BASE_ID, seed=1)
    slots = ArtifactSlots(load_plain(other), base_digest="sha256:" + f"{1:064x}", probe_ids=[5])
    for artifact in artifacts.values():
        with pytest.raises(ArtifactCorruptError, match="another version of the base"):
            slots.install(artifact.digest, artifact.folder)


def test_an_artifact_that_changes_nothing_is_refused(tmp_path: Path, base_folder: Path) -> None:
    manifest = build_artifact(tmp_path / "idle", base_folder, seed=0, scale=0.0)
    slots = make_slots(base_folder)
    with pytest.raises(SelfCheckError, match="changes nothing"):
        slots.install(manifest.digest, tmp_path / "idle")
    assert slots.installed == []
    assert torch.equal(last_logits(slots, None), plain_logits(base_folder))


@pytest.mark.parametrize("fault", ["missing", "foreign", "shape", "nan", "torn"])
@pytest.mark.parametrize("tuning", INSTALLABLE, ids=tuning_name)
def test_damaged_weights_are_refused_and_harm_nobody_else(
    tmp_path: Path, base_folder: Path, artifacts: dict[str, Artifact], fault: str, tuning: dict[str, Any]
) -> None:
    artifact = artifacts[tuning_name(tuning)]
    file_name = next(path.name for path in artifact.folder.glob("*.safetensors"))
    weights = load_file(artifact.folder / file_name)
    name = sorted(weights)[-1]
    if fault == "missing":
        del weights[name]
    elif fault == "foreign":
        weights["nobody." + name] = weights[name].clone()
    elif fault == "shape":
        weights[name] = weights[name].flatten()[1:].contiguous()
    else:
        weights[name] = torch.full_like(weights[name], torch.nan)
    bad = reseal(artifact, tmp_path / "bad", weights, file_name)
    if fault == "torn":
        (bad.folder / file_name).write_bytes(b"torn")
    slots, plain = make_slots(base_folder), plain_logits(base_folder)
    with pytest.raises((ArtifactCorruptError, SelfCheckError)):
        slots.install(bad.digest, bad.folder)
    assert torch.equal(last_logits(slots, None), plain)
    before = {key: last_logits(slots, other) for key, other in artifacts.items()}
    with pytest.raises((ArtifactCorruptError, SelfCheckError)):
        slots.install(bad.digest, bad.folder)
    assert bad.digest not in slots.installed
    for key, other in artifacts.items():
        assert torch.equal(last_logits(slots, other), before[key])
    assert torch.equal(last_logits(slots, None), plain)


@pytest.mark.parametrize("tuning", INSTALLABLE, ids=tuning_name)
def test_on_a_base_in_bf16_an_artifact_answers_as_its_method_loads_it_there(
    base_folder: Path, artifacts: dict[str, Artifact], tuning: dict[str, Any]
) -> None:
    artifact = artifacts[tuning_name(tuning)]
    served, reference = (load_base(base_folder, dtype=torch.bfloat16, device="cpu") for _ in range(2))
    slots = ArtifactSlots(served, base_digest=BASE_DIGEST, probe_ids=[5, 6, 7])
    logits_V = last_logits(slots, artifact)
    method = discover()[tuning["type"]]
    with torch.inference_mode():
        attached = method.load(reference, artifact.folder)
        expected_V = method.logits(attached, torch.tensor([IDS]))[0, -1].float()
    # A bf16 number has 8 bits of mantissa.
    torch.testing.assert_close(logits_V, expected_V, rtol=2**-6, atol=2**-5)
