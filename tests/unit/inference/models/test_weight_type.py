"""Which type a base is served in, and how models are verified in float32."""

import gc
from pathlib import Path

import pytest
import torch

from luthier.core.specs import BaseFacts
from luthier.inference.models import base_models, loading
from luthier.inference.models.base_models import LoadedBase, choose_dtype
from tests.inference_server import make_settings
from tests.tiny import BASE_ID, build_tiny_base
from tests.unit.inference.artifacts import build_method_artifact, load_tiny
from tests.unit.inference.models.test_adapter_cache import make_loaded, served_by, settle

pytestmark = pytest.mark.anyio


@pytest.fixture
def facts(tmp_path: Path) -> BaseFacts:
    base_folder = build_tiny_base(tmp_path / "bases" / BASE_ID)
    return BaseFacts.model_validate_json((base_folder / "base.json").read_bytes())


@pytest.mark.parametrize("has_it", [True, False])
def test_bfloat16_is_taken_where_the_device_multiplies_it_in_hardware(tmp_path, monkeypatch, has_it):
    monkeypatch.setattr(base_models, "cpu_multiplies_bf16", lambda: has_it)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_it or including_emulation
    )
    settings = make_settings(tmp_path, inference_dtype="auto")
    for device in ("cpu", "cuda"):
        assert choose_dtype(settings, device) is (torch.bfloat16 if has_it else torch.float32)
        for asked in ("float32", "bfloat16"):
            named = settings.model_copy(update={"inference_dtype": asked})
            assert choose_dtype(named, device) is getattr(torch, asked)


async def test_without_memory_for_float32_a_model_is_verified_in_bfloat16_alone_and_the_log_says_so(
    tmp_path, facts, monkeypatch, caplog
):
    folder = tmp_path / "bases" / facts.id

    def load_exact() -> LoadedBase:
        raise AssertionError("there is no memory for it")

    base = load_tiny(folder, torch.bfloat16, load_exact=load_exact)
    artifact = build_method_artifact(tmp_path / "a", folder, {"type": "lora", "rank": 2}, seed=1)
    monkeypatch.setattr(loading, "available_bytes", lambda: 0)
    served = served_by(base, artifact)
    loaded = make_loaded(0)
    loaded.release(await loaded.hold(served))
    assert loaded.digests == [artifact.digest]
    assert f"{artifact.digest} is verified in bfloat16 alone for want of memory" in caplog.text
    # It is tried again when it is loaded next.
    assert served.copy.verified_with(facts.digest) is None


async def test_the_base_in_float32_leaves_when_no_model_wants_it_and_a_model_that_is_served_on_it_keeps_it(
    tmp_path, facts, monkeypatch
):
    settings = make_settings(tmp_path, inference_dtype="auto")
    monkeypatch.setattr(base_models, "cpu_multiplies_bf16", lambda: True)
    monkeypatch.setattr(loading, "_EXACT_SECONDS", 0.0)
    base, tuning = base_models.load(settings, BASE_ID), {"type": "lora", "rank": 2}
    folder = tmp_path / "bases" / facts.id
    models = [
        served_by(base, build_method_artifact(tmp_path / str(seed), folder, tuning, seed=seed))
        for seed in (1, 2)
    ]
    loaded = make_loaded(0)
    ready = await loaded.hold(models[0])
    assert ready.base is base
    await settle()
    gc.collect()
    assert base.exact() is None
    models[1].copy.note_verified(facts.digest, "float32")
    kept = await loaded.hold(models[1])
    await settle()
    gc.collect()
    assert kept.base is base.exact()
    assert kept.served.fingerprint.endswith("-float32")
