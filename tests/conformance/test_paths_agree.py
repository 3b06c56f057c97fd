"""When two paths through one model are held for the same, and who judges where rounding parts them."""

import copy

import pytest
import torch

from luthier.core.specs import MOST_ROUNDING
from luthier.methods import Attached
from luthier.training.model.agreement import ComputesInFloat32, agrees, is_as_exact
from luthier.training.output.verification import record_canary
from tests.tiny_methods import CASES, LLAMA, Bench, Case, everything

LORA = Case(LLAMA, {"type": "lora"})


@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_bf16_weights_compute_in_float32_as_a_float32_copy_of_them_does(bench: Bench, case: Case) -> None:
    method, attached = bench.attach(case, dtype=torch.bfloat16)
    token_ids_BT = everything().token_ids_BT
    before = [parameter.clone() for parameter in attached.model.parameters()]
    with ComputesInFloat32():
        hidden_BTD = method.hidden_states(attached, token_ids_BT)
        logits_BTV = method.logits(attached, token_ids_BT)
    in_bf16_BTD = method.hidden_states(attached, token_ids_BT)
    copied = copy.deepcopy(attached)
    copied.model.float()
    assert hidden_BTD.dtype == torch.float32
    assert in_bf16_BTD.dtype == torch.bfloat16
    assert agrees(hidden_BTD, method.hidden_states(copied, token_ids_BT))
    assert agrees(logits_BTV, method.logits(copied, token_ids_BT))
    assert not agrees(in_bf16_BTD.float(), hidden_BTD)
    after = list(attached.model.parameters())
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_canary_is_float32s_answer_with_the_rounding_of_the_weights_type_beside_it(
    bench: Bench, dtype: torch.dtype
) -> None:
    job_model = bench.job_model(LORA, dtype=dtype)
    canary = record_canary(job_model, [5, 6, 7, 8])
    ids_1T = torch.tensor([canary.token_ids])
    rounded_V = job_model.method.logits(job_model.attached, ids_1T)[0, -1, canary.candidates].float()
    job_model.attached.model.float()
    exact_V = job_model.method.logits(job_model.attached, ids_1T)[0, -1, canary.candidates]
    assert canary.precision == str(dtype).removeprefix("torch.")
    assert canary.logits == pytest.approx(exact_V.tolist(), rel=1e-4)
    if dtype == torch.float32:
        assert canary.rounding == 0
    else:
        gap = (rounded_V - exact_V).norm() / exact_V.norm()
        assert 0 < canary.rounding == pytest.approx(gap.item(), rel=1e-3)


@torch.no_grad()
def test_rounding_beyond_what_may_be_excused_is_recorded_as_the_most_that_may(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_model = bench.job_model(LORA, dtype=torch.bfloat16)
    logits = job_model.method.logits

    def worse(attached: Attached, token_ids_BT: torch.Tensor) -> torch.Tensor:
        found_BTV = logits(attached, token_ids_BT)
        return found_BTV * 2 if found_BTV.dtype == torch.bfloat16 else found_BTV

    monkeypatch.setattr(job_model.method, "logits", worse)
    assert record_canary(job_model, [5, 6, 7, 8]).rounding == MOST_ROUNDING


def _noisy(exact_ND: torch.Tensor, size: float, seed: int) -> torch.Tensor:
    noise_ND = torch.randn(exact_ND.shape, generator=torch.Generator().manual_seed(seed))
    return exact_ND + size * noise_ND


EXACT_ND = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("noise", [0.01, 0.15, 0.22])
def test_two_results_equally_far_from_the_exact_ones_are_equally_right(noise: float) -> None:
    one, other = _noisy(EXACT_ND, noise, 1), _noisy(EXACT_ND, noise, 2)
    assert is_as_exact(one, other, EXACT_ND)
    assert agrees(one.bfloat16(), other.bfloat16()) == (noise == 0.01)


@pytest.mark.parametrize(
    "found",
    [
        pytest.param(_noisy(EXACT_ND, 0.15, 1) * 1.5, id="a wrong scale"),
        pytest.param(_noisy(EXACT_ND, 0.15, 1).roll(1, 0), id="other tokens"),
        pytest.param(torch.cat([_noisy(EXACT_ND, 0.15, 1)[:32], EXACT_ND[:8]]), id="a fifth of the tokens"),
        pytest.param(_noisy(EXACT_ND, 0.15, 1) * torch.nan, id="no numbers"),
    ],
)
def test_results_farther_from_the_exact_ones_than_the_plain_paths_are_wrong(found: torch.Tensor) -> None:
    assert not is_as_exact(found, _noisy(EXACT_ND, 0.15, 2), EXACT_ND)


def test_nothing_is_distinguished_from_plain_results_that_are_rounding_themselves() -> None:
    assert not is_as_exact(EXACT_ND, _noisy(EXACT_ND, 0.3, 1), EXACT_ND)
