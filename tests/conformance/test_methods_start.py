"""What a freshly attached method promises: its start, what it trains, and how much."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from luthier.methods import Workload, check_tuning, discover, parse_tuning
from tests.tiny_methods import CASES, DEFAULTS, METHODS, VARIANTS, Bench, Case, batch
from tests.tiny_shapes import facts_of

# The figures of the table of methods for SmolLM2-135M; `full` counts its vocabulary of 49,152 too.
FIGURES: list[tuple[dict[str, Any], int]] = [
    ({"type": "adapter", "bottleneck_dim": 64, "placement": "houlsby"}, 4_462_080),
    ({"type": "full"}, 134_515_008),
    ({"type": "lora", "rank": 8}, 2_442_240),
    ({"type": "prefix", "num_virtual_tokens": 20}, 230_400),
    ({"type": "prompt", "num_virtual_tokens": 20}, 11_520),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_start_equals_the_base_where_it_is_promised(bench: Bench, case: Case) -> None:
    method, attached = bench.attach(case)
    tokens = batch(0, 1).token_ids_BT
    with torch.no_grad():
        expected = bench.load(case.shape)(input_ids=tokens).logits
        found = method.logits(attached, tokens)
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


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_number_of_parameters_equals_the_formula(bench: Bench, case: Case) -> None:
    method, params = case.settle()
    causal_lm = bench.load(case.shape)
    expected = method.count_parameters(causal_lm, params)
    attached = method.attach(causal_lm, params, bench.start(case))
    assert attached.num_trained_parameters == expected > 0


@pytest.mark.parametrize("case", CASES, ids=str)
def test_hidden_states_are_what_the_output_layer_reads(bench: Bench, case: Case) -> None:
    method, attached = bench.attach(case)
    tokens = batch(0, 1).token_ids_BT
    with torch.no_grad():
        logits = attached.causal_lm.get_output_embeddings()(method.hidden_states(attached, tokens))
        cap = getattr(attached.causal_lm.config, "final_logit_softcapping", None)
        if cap:
            logits = cap * torch.tanh(logits / cap)
        assert torch.allclose(logits, method.logits(attached, tokens), atol=1e-5)


@pytest.mark.parametrize("case", DEFAULTS, ids=str)
def test_what_is_added_to_a_bf16_base_is_float32(bench: Bench, case: Case) -> None:
    trainee = bench.trainee(case, dtype=torch.bfloat16)
    assert trainee.attached.causal_lm.dtype == torch.bfloat16
    if not trainee.method.is_whole_model:
        assert {parameter.dtype for parameter in trainee.parameters} == {torch.float32}
    assert torch.isfinite(trainee.loss(batch(0)).nll_sum)


def test_every_method_has_its_figure() -> None:
    """A new method brings its own, from the table of methods."""
    assert {tuning["type"] for tuning, _ in FIGURES} >= set(METHODS)


@pytest.mark.parametrize(("tuning", "expected"), FIGURES, ids=[tuning["type"] for tuning, _ in FIGURES])
def test_parameters_on_the_small_base_are_those_of_the_table(tuning: dict[str, Any], expected: int) -> None:
    assert tuning["type"] in discover()
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49_152,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    facts = facts_of("llama").model_copy(
        update={"hidden_size": 576, "num_layers": 30, "context_length": 8192}
    )
    method, params = parse_tuning(check_tuning(tuning))
    params = method.resolve(params, Workload(facts, num_rows=500, num_tokens=50_000))
    assert method.count_parameters(model, params) == expected
