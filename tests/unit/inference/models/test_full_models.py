"""Artifacts for a full model: they answer as they were trained, in memory of their own."""

from pathlib import Path

import pytest
import torch

from luthier.core.errors import ArtifactCorruptError, InvalidRequestError, SelfCheckError
from luthier.core.inference import HEADER_ARTIFACT, HEADER_DIGEST, ModelTarget
from luthier.inference.models.artifact_cache import verify_copy
from luthier.inference.models.base_models import LoadedBase, ServedModel
from luthier.inference.models.loading import Kind, measure_weights
from luthier.inference.models.registry import read_target
from luthier.inference.verification.checks import Text, probe
from luthier.methods import discover
from tests.unit.inference.artifacts import (
    Artifact,
    all_tunings,
    build_method_artifact,
    load_tiny,
    method_logits,
    tuning_name,
)
from tests.unit.inference.models.test_adapter_cache import make_loaded

pytestmark = pytest.mark.anyio

IDS = [9, 30, 41, 5, 77, 12, 8]
WHOLE = [name for name, method in discover().items() if method.is_whole_model]
ON_WHOLE = [tuning for tuning in all_tunings() if tuning["type"] not in WHOLE]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, base_folder: Path) -> Artifact:
    folder = tmp_path_factory.mktemp("wholes") / "whole"
    return build_method_artifact(folder, base_folder, {"type": WHOLE[0]}, seed=4)


@pytest.fixture(scope="module")
def base(base_folder: Path) -> LoadedBase:
    return load_tiny(base_folder)


def served(base: LoadedBase, artifact: Artifact, whole: Artifact | None) -> ServedModel:
    full_model = None if whole is None else verify_copy(whole.folder)
    return ServedModel(base, artifact.digest, verify_copy(artifact.folder), full_model)


@pytest.mark.parametrize("tuning", ON_WHOLE, ids=tuning_name)
async def test_an_artifact_on_a_whole_model_gives_the_logits_that_its_method_gives_there(
    base, base_folder, whole, tmp_path, tuning
):
    artifact = build_method_artifact(tmp_path / "artifact", base_folder, tuning, seed=2, on=whole)
    expected_V = method_logits(whole.folder, artifact.folder, IDS)[-1]

    loaded = make_loaded(2**24, max_waiting=4)
    ready = await loaded.hold(served(base, artifact, whole))
    logits_V = probe(ready.executor, [Text(IDS, ready.adapter)])[0].last_V
    assert torch.allclose(logits_V, expected_V, atol=1e-4)
    assert not torch.allclose(logits_V, method_logits(base_folder, artifact.folder, IDS)[-1], atol=1e-2)
    # It is counted as the whole model that it holds, and touches nothing of the base.
    assert loaded.num_bytes(Kind.WHOLE) == measure_weights(whole.folder, torch.float32)
    assert set(loaded.digests) == {artifact.digest, whole.digest}
    assert ready.executor not in base.executors and base.reference is None
    loaded.release(ready)


async def test_an_artifact_is_loaded_on_no_weights_but_those_it_was_made_on(
    base, base_folder, whole, tmp_path
):
    tuning = {"type": "lora", "rank": 2}
    on_whole = build_method_artifact(tmp_path / "on-whole", base_folder, tuning, seed=2, on=whole)
    on_base = build_method_artifact(tmp_path / "on-base", base_folder, tuning, seed=3)

    loaded = make_loaded(2**24, max_waiting=4)
    for wrong in (served(base, on_whole, None), served(base, on_base, whole), served(base, whole, whole)):
        with pytest.raises((ArtifactCorruptError, SelfCheckError)):
            await loaded.hold(wrong)
    assert (loaded.digests, loaded.num_bytes(Kind.WHOLE)) == ([], 0)


def test_a_full_model_travels_in_headers_and_never_alone():
    names = ("model", "base_id", "project_id", "artifact", "digest", "full_model", "full_model_digest")
    target = ModelTarget(**dict(zip(names, "mbpadfe", strict=True)))
    assert read_target(target.to_headers()) == target
    for name in target.to_headers():
        if "foundation" in name:
            with pytest.raises(InvalidRequestError):
                read_target({key: value for key, value in target.to_headers().items() if key != name})
    artifacts_own = {HEADER_ARTIFACT, HEADER_DIGEST}
    with pytest.raises(InvalidRequestError):
        read_target({key: value for key, value in target.to_headers().items() if key not in artifacts_own})
