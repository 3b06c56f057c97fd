"""What training recorded of a model decides whether it is served."""

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from luthier.core.errors import ArtifactCorruptError, SelfCheckError
from luthier.core.shapes import read_shape
from luthier.core.specs import CANARY_NAME, Canary
from luthier.inference.engine.step import BatchExecutor
from luthier.inference.verification.checks import check_canary, read_canary, verify_adapter
from luthier.methods import method_of_artifact
from luthier.modeling.protocols import AdapterInfo, AdapterSource
from tests.unit.inference.artifacts import Artifact, build_method_artifact, load_plain, method_logits, pack

IDS = [9, 30, 41, 5, 77, 12, 8]
PROBE_IDS = [5, 6, 7]
Make = Callable[..., tuple[Artifact, BatchExecutor]]


def canary_of(logits_V: torch.Tensor, precision: str = "float32") -> Canary:
    values, candidates = logits_V.topk(8)
    return Canary(token_ids=IDS, candidates=candidates.tolist(), logits=values.tolist(), precision=precision)


def add(executor: BatchExecutor, base_folder: Path, weights: Path, config: Path) -> AdapterInfo:
    """Add an adapter of one folder's weights and another's configuration."""
    parts = method_of_artifact(config).read_parts(config, read_shape(base_folder))
    return executor.runner.add_adapter(AdapterSource(weights, parts))


@pytest.fixture
def make(tmp_path: Path, base_folder: Path) -> Make:
    """Make a LoRA artifact, and an executor of its base in a type."""

    def make(dtype: torch.dtype = torch.float32, scale: float = 0.2) -> tuple[Artifact, BatchExecutor]:
        tuning = {"type": "lora", "rank": 2}
        made = build_method_artifact(tmp_path / "a", base_folder, tuning, seed=1, scale=scale)
        model = load_plain(base_folder).to(dtype)
        return made, pack(model, base_folder, max_rows=2, max_cache_tokens=256)

    return make


def test_an_adapter_is_served_as_it_was_trained_and_refused_with_another_scale(tmp_path, base_folder, make):
    made, packed = make()
    canary = canary_of(method_logits(base_folder, made.folder, IDS)[-1])
    changed = tmp_path / "changed"
    shutil.copytree(made.folder, changed)
    config = json.loads((changed / "adapter_config.json").read_text())
    (changed / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": config["r"] * 4}))
    verify_adapter(packed, add(packed, base_folder, made.folder, made.folder), PROBE_IDS, canary)
    adapter = add(packed, base_folder, made.folder, changed)
    with pytest.raises(SelfCheckError, match="training recorded"):
        verify_adapter(packed, adapter, PROBE_IDS, canary)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_that_changes_nothing_is_found_beside_its_base(base_folder, make, dtype):
    made, packed = make(dtype, scale=0.0)
    adapter = add(packed, base_folder, made.folder, made.folder)
    for canary in (None, canary_of(method_logits(base_folder, made.folder, IDS)[-1])):
        with pytest.raises(SelfCheckError, match="changes nothing"):
            verify_adapter(packed, adapter, PROBE_IDS, canary)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", ["add_low_rank", "add_low_rank_to_chunks"])
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 3, len(IDS)])
def test_an_adapter_that_one_of_the_ways_leaves_out_is_not_served(
    base_folder, make, dtype, way, num_tokens, monkeypatch
):
    """With a recorded text of `num_tokens`, or without one."""
    made, packed = make(dtype)
    adapter = add(packed, base_folder, made.folder, made.folder)
    ids, canary = IDS[:num_tokens], None
    if ids:
        recorded = canary_of(method_logits(base_folder, made.folder, ids)[-1])
        canary = recorded.model_copy(update={"token_ids": ids})
    verify_adapter(packed, adapter, PROBE_IDS, canary)
    # Programs that were written down would run what is left out.
    monkeypatch.setattr(packed.runner.model, "_programs", None)
    monkeypatch.setattr(packed.runner.model.ops, way, lambda *_: None)
    if num_tokens == 1 and way == "add_low_rank_to_chunks":
        # All that there is are rows.
        verify_adapter(packed, adapter, PROBE_IDS, canary)
        return
    with pytest.raises(SelfCheckError, match=r"training recorded|changes nothing|Token by token"):
        verify_adapter(packed, adapter, PROBE_IDS, canary)


def test_rounding_is_allowed_for_where_either_side_rounds():
    logits_V = torch.randn(300, generator=torch.Generator().manual_seed(0))
    near_V = logits_V * 1.02
    with pytest.raises(SelfCheckError):
        check_canary(canary_of(logits_V), "float32", near_V)
    check_canary(canary_of(logits_V), "bfloat16", near_V)
    check_canary(canary_of(logits_V, "bfloat16"), "float32", near_V)
    with pytest.raises(SelfCheckError):
        check_canary(canary_of(logits_V), "bfloat16", logits_V.flip(0))
    with pytest.raises(SelfCheckError):
        check_canary(canary_of(logits_V), "bfloat16", logits_V * torch.nan)


@pytest.mark.parametrize(
    ("rounding", "scale", "is_served"),
    [(0.0, 1.15, False), (0.1, 1.15, True), (0.1, 1.25, False), (0.25, 1.2, True), (0.25, 1.3, False)],
)
def test_as_much_rounding_is_allowed_for_as_training_measured(rounding, scale, is_served):
    logits_V = torch.randn(300, generator=torch.Generator().manual_seed(0))
    measured = canary_of(logits_V, "bfloat16").model_copy(update={"rounding": rounding})
    refusal = nullcontext() if is_served else pytest.raises(SelfCheckError, match="training recorded")
    with refusal:
        check_canary(measured, "bfloat16", logits_V * scale)


@pytest.mark.parametrize("rounding", [0.3, -0.1, float("nan")])
def test_no_more_rounding_is_allowed_for_than_excuses_other_weights(rounding):
    canary = canary_of(torch.arange(300.0), "bfloat16")
    with pytest.raises(ValidationError, match="rounding"):
        Canary.model_validate(canary.model_dump() | {"rounding": rounding})


def test_an_older_artifact_has_none_and_a_broken_one_is_refused(tmp_path):
    assert read_canary(tmp_path) is None
    check_canary(None, "float32", torch.zeros(3))
    (tmp_path / CANARY_NAME).write_text("{}")
    with pytest.raises(ArtifactCorruptError):
        read_canary(tmp_path)
    with pytest.raises(ArtifactCorruptError):
        check_canary(canary_of(torch.arange(300.0)), "float32", torch.zeros(20))
