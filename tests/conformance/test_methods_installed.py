"""Artifacts on one base together: off, the base is itself; on, it answers as the artifact does."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from luthier.core.errors import ArtifactCorruptError
from luthier.methods import discover
from tests.tiny_methods import (
    DEFAULTS,
    LLAMA,
    VARIANTS,
    Bench,
    Case,
    batch,
    digest,
    logits_on,
)

INSTALLED = [
    case
    for case in DEFAULTS + [case for case in VARIANTS if case not in DEFAULTS]
    if not discover()[case.tuning["type"]].is_whole_model
]
NAMES = sorted({case.tuning["type"] for case in INSTALLED})
TOKENS = batch(4, 5).token_ids_BT


def save_trained(bench: Bench, case: Case, folder: Path) -> torch.Tensor:
    """Train, save, and return the logits of what `load` makes of it."""
    job_model = bench.trained(case, 2)
    folder.mkdir()
    job_model.method.save(job_model.attached, folder)
    again = job_model.method.load(bench.load(case.shape), folder)
    with torch.no_grad():
        return job_model.method.logits(again, TOKENS)


@torch.no_grad()
@pytest.mark.parametrize("case", INSTALLED, ids=str)
def test_an_artifact_is_itself_when_on_and_nothing_when_off(bench: Bench, tmp_path: Path, case: Case) -> None:
    with torch.enable_grad():
        tuned = save_trained(bench, case, tmp_path / "a")
    causal_lm = bench.load(case.shape)
    own = causal_lm(input_ids=TOKENS).logits
    before = digest([*causal_lm.parameters(), *causal_lm.buffers()])
    method, _ = case.settle()
    installed = method.install(causal_lm, tmp_path / "a", "a")
    assert torch.equal(causal_lm(input_ids=TOKENS).logits, own)
    installed.switch_on()
    assert torch.allclose(logits_on(causal_lm, installed, TOKENS), tuned, atol=1e-5)
    installed.switch_off()
    assert torch.equal(causal_lm(input_ids=TOKENS).logits, own)
    installed.remove()
    assert torch.equal(causal_lm(input_ids=TOKENS).logits, own)
    assert digest([*causal_lm.parameters(), *causal_lm.buffers()]) == before
    assert installed.prefix() == []


@torch.no_grad()
def test_artifacts_of_all_methods_share_a_base(bench: Bench, tmp_path: Path) -> None:
    causal_lm = bench.load(LLAMA)
    own = causal_lm(input_ids=TOKENS).logits
    tuned, installed = {}, {}
    for name in NAMES:
        for number in range(2):
            key, case = f"{name}{number}", Case(LLAMA, {"type": name})
            with torch.enable_grad():
                tuned[key] = save_trained(bench, case, tmp_path / key)
            installed[key] = discover()[name].install(causal_lm, tmp_path / key, key)
    for key, one in installed.items():
        one.switch_on()
        assert torch.allclose(logits_on(causal_lm, one, TOKENS), tuned[key], atol=1e-5)
        one.switch_off()
        assert torch.equal(causal_lm(input_ids=TOKENS).logits, own)
    first = NAMES[0] + "0"
    installed.pop(first).remove()
    for key, one in installed.items():
        one.switch_on()
        assert torch.allclose(logits_on(causal_lm, one, TOKENS), tuned[key], atol=1e-5)
        one.switch_off()
        one.remove()
    assert torch.equal(causal_lm(input_ids=TOKENS).logits, own)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_a_prefix_has_the_bases_type(bench: Bench, tmp_path: Path, name: str) -> None:
    method, attached = bench.attach(Case(LLAMA, {"type": name}))
    method.save(attached, tmp_path)
    causal_lm = bench.load(LLAMA, torch.bfloat16)
    prefix = method.install(causal_lm, tmp_path, "a").prefix()
    assert len(prefix) in {0, causal_lm.config.num_hidden_layers}
    assert all(part.dtype == torch.bfloat16 for pair in prefix for part in pair)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_tensors_that_do_not_fit_the_base_are_refused_and_leave_it_as_it_was(
    bench: Bench, tmp_path: Path, name: str
) -> None:
    method, attached = bench.attach(Case(LLAMA, {"type": name}))
    method.save(attached, tmp_path)
    causal_lm = bench.load(LLAMA)
    own = causal_lm(input_ids=TOKENS).logits
    names = [child for child, _ in causal_lm.named_modules()]
    path = tmp_path / "adapter_model.safetensors"
    whole = load_file(path)
    broken = [
        {key: value[..., :-1].contiguous() for key, value in whole.items()},
        {f"{key}.other": value for key, value in whole.items()},
        {},
    ]
    for tensors in broken:
        save_file(tensors, path)
        with pytest.raises(ArtifactCorruptError):
            method.install(causal_lm, tmp_path, "a")
        assert [child for child, _ in causal_lm.named_modules()] == names
        assert torch.equal(causal_lm(input_ids=TOKENS).logits, own)
    path.write_bytes(b"no tensors")
    with pytest.raises(ArtifactCorruptError):
        method.install(causal_lm, tmp_path, "a")
