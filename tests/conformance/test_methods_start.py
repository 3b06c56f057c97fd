"""What a freshly attached method promises: its start, what it trains, and how much."""

import pytest
import torch

from tests.tiny_methods import CASES, DEFAULTS, VARIANTS, Bench, Case, batch


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_start_equals_the_base_where_it_is_promised_and_hidden_states_are_what_the_output_layer_reads(
    bench: Bench, case: Case
) -> None:
    method, attached = bench.attach(case)
    tokens = batch(0, 1).token_ids_BT
    with torch.no_grad():
        expected = bench.load(case.shape)(input_ids=tokens).logits
        found = method.logits(attached, tokens)
        logits = attached.causal_lm.get_output_embeddings()(method.hidden_states(attached, tokens))
    cap = getattr(attached.causal_lm.config, "final_logit_softcapping", None)
    if cap:
        logits = cap * torch.tanh(logits / cap)
    assert torch.allclose(logits, found, atol=1e-5)
    assert found.shape == expected.shape
    if method.starts_as_base:
        assert torch.equal(found, expected)
    else:
        assert not torch.allclose(found, expected, atol=1e-3)


@pytest.mark.parametrize("case", VARIANTS, ids=str)
def test_the_start_depends_on_nothing_but_what_it_is_given(bench: Bench, case: Case) -> None:
    starts = []
    for noise in range(2):
        torch.manual_seed(noise)
        _, attached = bench.attach(case)
        starts.append(torch.cat([p.detach().flatten() for _, p in attached.named_trained_parameters()]))
    assert torch.equal(starts[0], starts[1])


@pytest.mark.parametrize("case", DEFAULTS, ids=str)
def test_what_is_added_to_a_bf16_base_is_float32(bench: Bench, case: Case) -> None:
    job_model = bench.job_model(case, dtype=torch.bfloat16)
    assert job_model.attached.causal_lm.dtype == torch.bfloat16
    if not job_model.method.is_whole_model:
        assert {parameter.dtype for parameter in job_model.parameters} == {torch.float32}
    assert torch.isfinite(job_model.loss(batch(0)).nll_sum)
