"""The fast path gives the plain path's outputs and gradients, and steps aside for what it does not know."""

from pathlib import Path
from typing import Any

import pytest
import torch

from luthier.methods import Attached, check_tuning, parse_tuning
from luthier.modeling import fused_llama
from luthier.modeling.fused_llama import fuse
from luthier.modeling.load import load_base
from tests.tiny import build_tiny_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_base(tmp_path_factory.mktemp("bases") / "tiny")


def attach(base: Path, dtype: torch.dtype = torch.float32, **tuning: Any) -> Attached:
    """Attach LoRA with weights that are all away from zero."""
    method, params = parse_tuning(check_tuning({"rank": 4, "alpha": 8.0, "dropout": 0.0, **tuning}))
    model = load_base(base, dtype=dtype, device="cpu")
    attached = method.attach(model, params, seed=3, base_id="tiny")
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, parameter in attached.named_trained_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return attached


def plain(attached: Attached, token_ids_BT: torch.Tensor) -> torch.Tensor:
    return attached.causal_lm.model(input_ids=token_ids_BT, use_cache=False).last_hidden_state


def gradients(attached: Attached, hidden_BTD: torch.Tensor) -> list[torch.Tensor]:
    torch.manual_seed(7)
    (hidden_BTD.float() * torch.randn(hidden_BTD.shape)).sum().backward()
    found = [parameter.grad for _, parameter in attached.named_trained_parameters()]
    assert all(gradient is not None for gradient in found)
    for _, parameter in attached.named_trained_parameters():
        parameter.grad = None
    return [gradient for gradient in found if gradient is not None]


TOKENS = torch.randint(3, 300, (3, 21), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "tuning",
    [
        {},
        {"use_rslora": True},
        {"target_modules": "attention"},
        {"target_modules": ["v_proj", "down_proj"]},
        {"rank": 32},
    ],
)
@pytest.mark.parametrize("longest_batched", [384, 4])
def test_hidden_states_and_gradients_equal_the_plain_path(
    base: Path, tuning: dict[str, Any], longest_batched: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_llama, "_MAX_BATCHED_ATTENTION", longest_batched)
    attached = attach(base, **tuning)
    expected = plain(attached, TOKENS)
    expected_gradients = gradients(attached, expected)
    fused = fuse(attached.causal_lm)
    assert fused is not None
    found = fused.hidden_states(TOKENS)
    assert torch.allclose(found, expected, atol=2e-5)
    for gradient, other in zip(gradients(attached, found), expected_gradients, strict=True):
        assert torch.allclose(gradient, other, atol=1e-4 * float(other.abs().max()))


def test_it_trains_exactly_the_methods_parameters(base: Path) -> None:
    attached = attach(base, target_modules="mlp")
    fused = fuse(attached.causal_lm)
    assert fused is not None
    assert {id(p) for p in fused.parameters} == {id(p) for _, p in attached.named_trained_parameters()}


def test_in_bfloat16_it_is_no_farther_from_float32_than_the_plain_path(base: Path) -> None:
    truth = gradients(exact := attach(base), plain(exact, TOKENS))

    def distance(found: list[torch.Tensor]) -> float:
        return float(sum(((a - b) ** 2).sum() for a, b in zip(found, truth, strict=True))) ** 0.5

    attached = attach(base, torch.bfloat16)
    plain_distance = distance(gradients(attached, plain(attached, TOKENS)))
    fused = fuse(attached.causal_lm)
    assert fused is not None
    assert distance(gradients(attached, fused.hidden_states(TOKENS))) < 1.5 * plain_distance


def test_the_plain_path_gives_the_same_after_its_weights_became_views(base: Path) -> None:
    attached = attach(base)
    with torch.no_grad():
        before = plain(attached, TOKENS)
        fuse(attached.causal_lm)
        assert torch.allclose(plain(attached, TOKENS), before, atol=1e-6)


def test_it_sees_parameters_as_the_optimizer_left_them(base: Path) -> None:
    attached = attach(base)
    fused = fuse(attached.causal_lm)
    assert fused is not None
    with torch.no_grad():
        for _, parameter in attached.named_trained_parameters():
            parameter.mul_(2.0)
        assert torch.allclose(fused.hidden_states(TOKENS), plain(attached, TOKENS), atol=5e-5)


@pytest.mark.parametrize("tuning", [{"use_dora": True}, {"dropout": 0.1}])
def test_it_steps_aside_for_variants_and_dropout(base: Path, tuning: dict[str, Any]) -> None:
    assert fuse(attach(base, **tuning).causal_lm) is None


def test_it_steps_aside_for_other_architectures() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    assert fuse(GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=50))) is None
