"""The fast path gives the plain path's outputs and gradients, and steps aside for what it does not know."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from luthier.core.specs import BaseFacts
from luthier.methods import Attached, Method, Start, Workload
from luthier.methods._tuning import check_tuning, parse_tuning
from luthier.modeling.load import load_base
from luthier_cpu.gemm.panel_products import PanelProducts, has_panels
from luthier_cpu.training import attention as fused_attention
from luthier_cpu.training.linear import WideProducts
from luthier_cpu.training.llama import FusedLlama, fuse

METHODS: list[dict[str, Any]] = [
    {"type": "lora"},
    {"type": "lora", "use_rslora": True},
    {"type": "lora", "target_modules": "attention"},
    {"type": "lora", "target_modules": ["v_proj", "down_proj"]},
    {"type": "lora", "rank": 32},
    {"type": "prefix", "num_virtual_tokens": 5},
    {"type": "prefix", "num_virtual_tokens": 5, "projection": True},
    {"type": "prompt", "num_virtual_tokens": 5},
    {"type": "adapter", "bottleneck_dim": 8},
    {"type": "adapter", "bottleneck_dim": 8, "placement": "pfeiffer", "activation": "tanh"},
    {"type": "full"},
]


def attach(base: Path, dtype: torch.dtype = torch.float32, **tuning: Any) -> tuple[Method, Attached]:
    """Attach a method with parameters that are all away from their start."""
    method, params = parse_tuning(check_tuning(tuning))
    facts = BaseFacts.model_validate_json((base / "base.json").read_bytes())
    params = method.resolve(params, Workload(facts, 100, 1000))
    start = Start(3, "tiny", lambda text: [len(word) for word in text.split()], [list(range(5, 30))])
    attached = method.attach(load_base(base, dtype=dtype, device="cpu"), params, start)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, parameter in attached.named_trained_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(dtype) * 0.1)
    return method, attached


def gradients(attached: Attached, hidden_BTD: torch.Tensor) -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    (hidden_BTD.float() * torch.randn(hidden_BTD.shape)).sum().backward()
    found = {name: parameter.grad for name, parameter in attached.named_trained_parameters()}
    for _, parameter in attached.named_trained_parameters():
        parameter.grad = None
    return {name: gradient for name, gradient in found.items() if gradient is not None}


def fused(method: Method, attached: Attached) -> FusedLlama:
    found = fuse(method, attached)
    assert found is not None
    return found


def all_hidden_states(path: FusedLlama) -> torch.Tensor:
    """Return hidden_BTD of all tokens of `TOKENS`."""
    wanted_BT = torch.ones_like(TOKENS, dtype=torch.bool)
    return path.wanted_hidden_states(TOKENS, wanted_BT).view(*TOKENS.shape, -1)


def assert_equal(attached: Attached, expected: torch.Tensor, found: torch.Tensor) -> None:
    """Compare two paths' hidden states, and the gradients that follow from each."""
    assert torch.allclose(found, expected, atol=3e-5)
    expected_gradients, found_gradients = gradients(attached, expected), gradients(attached, found)
    assert found_gradients.keys() == expected_gradients.keys()
    for name, other in expected_gradients.items():
        assert torch.allclose(found_gradients[name], other, atol=1e-4 * float(other.abs().max())), name


TOKENS = torch.randint(3, 300, (3, 21), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("tuning", METHODS, ids=str)
@pytest.mark.parametrize("block_tokens", [256, 8])
def test_hidden_states_and_gradients_equal_the_plain_path(
    base: Path, tuning: dict[str, Any], block_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_attention, "_BLOCK_TOKENS", block_tokens)
    monkeypatch.setattr(fused_attention, "_MAX_KEPT_TOKENS", block_tokens)
    method, attached = attach(base, **tuning)
    expected = method.hidden_states(attached, TOKENS)
    assert_equal(attached, expected, all_hidden_states(fused(method, attached)))


@pytest.mark.parametrize("tuning", METHODS, ids=str)
@pytest.mark.parametrize("block_tokens", [256, 8])
def test_tokens_that_all_rows_begin_with_give_the_same_once_as_in_every_row(
    base: Path, tuning: dict[str, Any], block_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_attention, "_BLOCK_TOKENS", block_tokens)
    monkeypatch.setattr(fused_attention, "_MAX_KEPT_TOKENS", block_tokens)
    num_shared = 9
    rows = torch.cat([TOKENS[:1, :num_shared].expand(3, -1), TOKENS[:, num_shared:]], dim=1)
    method, attached = attach(base, **tuning)
    expected = method.hidden_states(attached, rows)[:, num_shared:]
    wanted = torch.ones(3, 21 - num_shared, dtype=torch.bool)
    found = fused(method, attached).wanted_hidden_states(rows, wanted, num_shared=num_shared)
    assert_equal(attached, expected.flatten(0, 1), found)


@pytest.mark.parametrize("tuning", METHODS, ids=str)
@pytest.mark.parametrize("num_shared", [0, 9])
def test_tokens_that_are_wanted_are_the_same_alone(
    base: Path, tuning: dict[str, Any], num_shared: int
) -> None:
    rows = torch.cat([TOKENS[:1, :num_shared].expand(3, -1), TOKENS[:, num_shared:]], dim=1)
    wanted = torch.rand(3, 21 - num_shared, generator=torch.Generator().manual_seed(2)) < 0.3
    wanted[1] = False
    method, attached = attach(base, **tuning)
    expected = method.hidden_states(attached, rows)[:, num_shared:][wanted]
    assert_equal(
        attached, expected, fused(method, attached).wanted_hidden_states(rows, wanted, num_shared=num_shared)
    )


@pytest.mark.parametrize("kind", ["lora", "adapter", "full"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_all_products_in_bfloat16_are_by_panels_where_these_are_made(
    base: Path, kind: str, dtype: torch.dtype
) -> None:
    path = fused(*attach(base, dtype, type=kind))
    kinds = {type(one.products) for block in path._blocks for one in block.fused}
    assert kinds == {PanelProducts if dtype == torch.bfloat16 and has_panels() else WideProducts}


def test_tokens_that_are_wanted_must_be_the_rows_own(base: Path) -> None:
    path = fused(*attach(base))
    for num_rows, num_shared in ((2, 0), (4, 0), (3, 1)):
        with pytest.raises(ValueError, match="the rows' own"):
            path.wanted_hidden_states(
                TOKENS, torch.ones(num_rows, 21, dtype=torch.bool), num_shared=num_shared
            )


def test_nothing_runs_where_no_token_is_wanted(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method, attached = attach(base)
    path = fused(method, attached)
    monkeypatch.setattr(path, "_run", None)
    for tokens in (TOKENS, TOKENS[:, :1]):
        wanted = torch.zeros(tokens[:, 1:].shape, dtype=torch.bool)
        assert path.wanted_hidden_states(tokens, wanted, num_shared=1).shape == (
            0,
            attached.causal_lm.config.hidden_size,
        )


def test_it_trains_exactly_the_methods_parameters(base: Path) -> None:
    method, attached = attach(base, target_modules="mlp")
    reached = {id(parameter) for parameter in fused(method, attached).parameters}
    assert reached == {id(parameter) for _, parameter in attached.named_trained_parameters()}


@pytest.mark.parametrize("kind", ["lora", "prefix", "prompt", "full"])
def test_in_bfloat16_it_is_no_farther_from_float32_than_the_plain_path(base: Path, kind: str) -> None:
    method, exact = attach(base, type=kind)
    truth = gradients(exact, method.hidden_states(exact, TOKENS))

    def distance(found: dict[str, torch.Tensor]) -> float:
        return sum(float(((found[name].float() - truth[name]) ** 2).sum()) for name in truth) ** 0.5

    method, attached = attach(base, torch.bfloat16, type=kind)
    plain_distance = distance(gradients(attached, method.hidden_states(attached, TOKENS)))
    hidden_BTD = all_hidden_states(fused(method, attached))
    assert distance(gradients(attached, hidden_BTD)) < 1.5 * plain_distance


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_plain_path_gives_the_same_after_its_weights_became_views(base: Path, kind: str) -> None:
    method, attached = attach(base, type=kind)
    with torch.no_grad():
        before = method.hidden_states(attached, TOKENS)
        fused(method, attached)
        assert torch.allclose(method.hidden_states(attached, TOKENS), before, atol=1e-6)


@pytest.mark.parametrize("kind", ["lora", "prefix", "prompt", "adapter", "full"])
def test_it_sees_parameters_as_the_optimizer_left_them(base: Path, kind: str) -> None:
    method, attached = attach(base, type=kind)
    path = fused(method, attached)
    with torch.no_grad():
        for _, parameter in attached.named_trained_parameters():
            parameter.mul_(1.5)
        expected = method.hidden_states(attached, TOKENS)
        assert torch.allclose(all_hidden_states(path), expected, atol=1e-4)


@pytest.mark.parametrize(
    "tuning",
    [{"use_dora": True}, {"dropout": 0.1}, {"type": "adapter", "placement": "parallel"}],
    ids=str,
)
def test_it_steps_aside_for_what_it_does_not_know(base: Path, tuning: dict[str, Any]) -> None:
    assert fuse(*attach(base, **tuning)) is None


class _Quantised(nn.Linear):
    """As bitsandbytes' layers are: linear by their class, with a weight in a form of their own."""


@pytest.mark.parametrize("has_adapter", [True, False])
def test_it_steps_aside_for_quantised_layers(base: Path, has_adapter: bool) -> None:
    method, attached = attach(base, type="lora", rank=2, target_modules=["q_proj", "v_proj"])
    attention = attached.causal_lm.model.layers[1].self_attn
    layer = attention.q_proj.base_layer if has_adapter else attention.o_proj
    layer.__class__ = _Quantised
    assert fuse(method, attached) is None


def test_it_steps_aside_for_other_architectures() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=50))
    method, _ = parse_tuning({"type": "full"})
    assert fuse(method, Attached(model=model, causal_lm=model)) is None


def test_what_is_no_number_stays_visible(base: Path) -> None:
    method, attached = attach(base)
    path = fused(method, attached)
    with torch.no_grad():
        attached.named_trained_parameters()[0][1][0, 0] = float("nan")
        assert torch.isnan(all_hidden_states(path)).any()
