"""What training recorded of a model decides whether it is served."""

import json
import shutil
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
from tests.tiny import BASE_ID, build_tiny_base
from tests.unit.inference.artifacts import build_method_artifact, load_plain, method_logits, pack

IDS = [9, 30, 41, 5, 77, 12, 8]
PROBE_IDS = [5, 6, 7]


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_base(tmp_path_factory.mktemp("bases") / BASE_ID)


def canary_of(logits_V: torch.Tensor, precision: str = "float32") -> Canary:
    values, candidates = logits_V.topk(8)
    return Canary(token_ids=IDS, candidates=candidates.tolist(), logits=values.tolist(), precision=precision)


def give_proof(executor: BatchExecutor, adapter: AdapterInfo, canary: Canary | None) -> None:
    verify_adapter(executor, adapter, PROBE_IDS, canary)


def test_an_adapter_is_served_as_it_was_trained_and_refused_with_another_scale(
    tmp_path: Path, base_folder: Path
) -> None:
    made = build_method_artifact(tmp_path / "a", base_folder, {"type": "lora", "rank": 2}, seed=1)
    canary = canary_of(method_logits(base_folder, made.folder, IDS)[-1])
    changed = tmp_path / "changed"
    shutil.copytree(made.folder, changed)
    config = json.loads((changed / "adapter_config.json").read_text())
    (changed / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": config["r"] * 4}))
    packed = pack(load_plain(base_folder), base_folder, max_rows=2, max_cache_tokens=256)

    def prove(folder: Path) -> None:
        parts = method_of_artifact(folder).read_parts(folder, read_shape(base_folder))
        assert parts is not None
        adapter = packed.runner.add_adapter(AdapterSource(made.folder, parts))
        give_proof(packed, adapter, canary)

    prove(made.folder)
    with pytest.raises(SelfCheckError, match="training recorded"):
        prove(changed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_that_changes_nothing_is_told_beside_its_base(
    tmp_path: Path, base_folder: Path, dtype: torch.dtype
) -> None:
    tuning = {"type": "lora", "rank": 2}
    made = build_method_artifact(tmp_path / "a", base_folder, tuning, seed=1, scale=0.0)
    plain = load_plain(base_folder).to(dtype)
    packed = pack(plain, base_folder, max_rows=2, max_cache_tokens=256)
    parts = method_of_artifact(made.folder).read_parts(made.folder, read_shape(base_folder))
    assert parts is not None
    adapter = packed.runner.add_adapter(AdapterSource(made.folder, parts))
    for canary in (None, canary_of(method_logits(base_folder, made.folder, IDS)[-1])):
        with pytest.raises(SelfCheckError, match="changes nothing"):
            give_proof(packed, adapter, canary)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", ["add_low_rank", "add_stretches"])
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 3, len(IDS)])
def test_an_adapter_that_one_of_the_ways_leaves_out_is_not_served(
    tmp_path: Path,
    base_folder: Path,
    dtype: torch.dtype,
    way: str,
    num_tokens: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a recorded text of so many tokens, or without one."""
    made = build_method_artifact(tmp_path / "a", base_folder, {"type": "lora", "rank": 2}, seed=1)
    plain = load_plain(base_folder).to(dtype)
    packed = pack(plain, base_folder, max_rows=2, max_cache_tokens=256)
    parts = method_of_artifact(made.folder).read_parts(made.folder, read_shape(base_folder))
    assert parts is not None
    adapter = packed.runner.add_adapter(AdapterSource(made.folder, parts))
    ids, canary = IDS[:num_tokens], None
    if ids:
        recorded = canary_of(method_logits(base_folder, made.folder, ids)[-1])
        canary = recorded.model_copy(update={"token_ids": ids})
    give_proof(packed, adapter, canary)
    # Programs that were written down would run what is left out.
    monkeypatch.setattr(packed.runner.model, "_programs", None)
    monkeypatch.setattr(packed.runner.model.ops, way, lambda *_: None)
    if num_tokens == 1 and way == "add_stretches":
        # All that there is are rows.
        give_proof(packed, adapter, canary)
        return
    with pytest.raises(SelfCheckError, match=r"training recorded|changes nothing|Token by token"):
        give_proof(packed, adapter, canary)


def test_rounding_is_allowed_for_where_either_side_rounds() -> None:
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


def test_as_much_rounding_is_allowed_for_as_training_measured_and_no_more_than_excuses_other_weights() -> (
    None
):
    logits_V = torch.randn(300, generator=torch.Generator().manual_seed(0))
    canary = canary_of(logits_V, "bfloat16")
    for rounding, scale, is_served in (
        (0.0, 1.15, False),
        (0.1, 1.15, True),
        (0.1, 1.25, False),
        (0.25, 1.2, True),
        (0.25, 1.3, False),
    ):
        measured = canary.model_copy(update={"rounding": rounding})

        def prove(measured: Canary = measured, served_V: torch.Tensor = logits_V * scale) -> None:
            check_canary(measured, "bfloat16", served_V)

        if is_served:
            prove()
        else:
            with pytest.raises(SelfCheckError, match="training recorded"):
                prove()
    for rounding in (0.3, -0.1, float("nan")):
        with pytest.raises(ValidationError, match="rounding"):
            Canary.model_validate(canary.model_dump() | {"rounding": rounding})


def test_an_older_artifact_has_none_and_a_broken_one_is_refused(tmp_path: Path) -> None:
    assert read_canary(tmp_path) is None
    check_canary(None, "float32", torch.zeros(3))
    (tmp_path / CANARY_NAME).write_text("{}")
    with pytest.raises(ArtifactCorruptError):
        read_canary(tmp_path)
    with pytest.raises(ArtifactCorruptError):
        check_canary(canary_of(torch.arange(300.0)), "float32", torch.zeros(20))
