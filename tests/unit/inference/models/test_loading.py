"""Adapters of every method on a base of a known and of another architecture, verified when loaded."""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from luthier.core.errors import ArtifactCorruptError, SelfCheckError
from luthier.inference.models.base_models import LoadedBase, ReadyModel
from luthier.inference.runners.paged import PagedRunner
from luthier.inference.runners.reference import ReferenceRunner
from luthier.inference.runners.registry import find_providers
from luthier.inference.verification.checks import Text, probe
from luthier.methods import discover
from luthier.modeling.protocols import AdapterSource, Logits, ScheduledBatch, UnsupportedAdapterError
from luthier_cpu.decode.runner import PackedRunner
from tests.tiny import BASE_ID, build_tiny_base
from tests.tiny_shapes import build_shape
from tests.unit.inference.artifacts import (
    Artifact,
    all_tunings,
    build_artifact,
    build_method_artifact,
    damage,
    load_plain,
    load_tiny,
    method_logits,
    tuning_name,
)
from tests.unit.inference.models.test_adapter_cache import make_loaded, served_by

IDS = [5, 6, 7, 8]
ADAPTERS = [one for one in all_tunings() if not discover()[one["type"]].is_whole_model]
ARCHITECTURES = ("llama", "gemma3")


@pytest.fixture(scope="module", params=ARCHITECTURES)
def base_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bases")
    folder = build_tiny_base(root / BASE_ID)
    if request.param != "llama":
        for path in build_shape(root / "shape", request.param).iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.fixture(scope="module")
def base(base_folder: Path) -> LoadedBase:
    torch.set_num_threads(1)
    return load_tiny(base_folder)


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory, base_folder: Path) -> dict[str, Artifact]:
    folder = tmp_path_factory.mktemp("artifacts")
    return {
        tuning_name(tuning): build_method_artifact(folder / f"a{i}", base_folder, tuning, seed=i)
        for i, tuning in enumerate(ADAPTERS)
    }


def hold(base: LoadedBase, *artifacts: Artifact) -> list[ReadyModel]:
    """Load and verify artifacts, which stay."""

    async def run() -> list[ReadyModel]:
        loaded = make_loaded(0)
        return [await loaded.hold(served_by(base, one)) for one in artifacts]

    return asyncio.run(run())


def last_logits(ready: ReadyModel) -> torch.Tensor:
    return probe(ready.executor, [Text(IDS, ready.adapter)])[0].last_V


def base_logits(base: LoadedBase) -> torch.Tensor:
    return probe(base.executor, [Text(IDS, None)])[0].last_V


@torch.inference_mode()
def plain_logits(base_folder: Path) -> torch.Tensor:
    logits_V: torch.Tensor = load_plain(base_folder)(input_ids=torch.tensor([IDS])).logits[0, -1]
    return logits_V


def test_every_artifact_answers_as_its_method_loads_it_and_the_base_as_if_there_were_none(
    base, base_folder, artifacts
):
    plain_V = plain_logits(base_folder)
    ready = hold(base, *artifacts.values())
    for artifact, one in zip(artifacts.values(), ready, strict=True):
        expected_V = method_logits(base_folder, artifact.folder, IDS)[-1]
        torch.testing.assert_close(last_logits(one), expected_V, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(expected_V, plain_V, atol=1e-3)
        torch.testing.assert_close(base_logits(base), plain_V, rtol=1e-4, atol=1e-4)


def test_an_artifact_that_changes_nothing_is_refused(tmp_path, base, base_folder):
    manifest = build_artifact(tmp_path / "idle", base_folder, seed=0, scale=0.0)
    with pytest.raises(SelfCheckError, match="changes nothing"):
        hold(base, Artifact(manifest.digest, tmp_path / "idle"))


@pytest.mark.parametrize("fault", ["missing", "foreign", "shape", "nan", "torn", "other base"])
@pytest.mark.parametrize("tuning", ADAPTERS, ids=tuning_name)
def test_damaged_weights_are_refused_and_change_no_other_model(tmp_path, base, artifacts, fault, tuning):
    artifact = artifacts[tuning_name(tuning)]
    bad = damage(artifact, tmp_path / "bad", fault)
    [good] = hold(base, artifact)
    before_V, base_before_V = last_logits(good), base_logits(base)
    for _ in range(2):
        with pytest.raises((ArtifactCorruptError, SelfCheckError)) as refused:
            hold(base, bad)
        assert fault != "other base" or "another version of the base" in refused.value.message
    assert torch.equal(last_logits(good), before_V)
    assert torch.equal(base_logits(base), base_before_V)


def test_an_adapter_that_the_bases_runner_does_not_support_is_served_by_a_reference_runner_beside_it(
    tmp_path, monkeypatch
):
    folder = build_tiny_base(tmp_path / BASE_ID)
    base, tuning = load_tiny(folder), {"type": "lora", "rank": 2}
    made = [build_method_artifact(tmp_path / str(seed), folder, tuning, seed=seed) for seed in range(2)]
    num_bytes = base.num_bytes

    def refuse(self: PackedRunner, source: AdapterSource) -> AdapterSource:
        raise UnsupportedAdapterError("There is no place for this rank.")

    monkeypatch.setattr(PackedRunner, "prepare_adapter", refuse)
    ready = hold(base, *made)
    assert isinstance(base.executor.runner, PackedRunner)
    assert [one.executor for one in ready] == [base.reference] * 2
    assert isinstance(ready[0].executor.runner, ReferenceRunner)
    assert base.num_bytes == 2 * num_bytes
    for artifact, one in zip(made, ready, strict=True):
        expected_V = method_logits(folder, artifact.folder, IDS)[-1]
        torch.testing.assert_close(last_logits(one), expected_V, rtol=1e-4, atol=1e-4)


def test_a_runner_that_disagrees_with_transformers_does_not_serve(tmp_path, monkeypatch, caplog):
    folder = build_tiny_base(tmp_path / BASE_ID)
    for runner in (PackedRunner, PagedRunner):

        def wrong(
            self: Any, batch: ScheduledBatch, execute: Callable[..., Logits] = runner.execute
        ) -> SimpleNamespace:
            logits = execute(self, batch)
            return SimpleNamespace(rows=lambda rows: logits.rows(rows) * 1.01)

        monkeypatch.setattr(runner, "execute", wrong)
    with caplog.at_level(logging.ERROR):
        base = load_tiny(folder)
    assert isinstance(base.executor.runner, ReferenceRunner)
    for name, _ in [*find_providers()][:-1]:
        assert f"{name} does not agree with transformers" in caplog.text
    torch.testing.assert_close(base_logits(base), plain_logits(folder), rtol=1e-4, atol=1e-4)
