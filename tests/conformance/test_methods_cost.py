"""What a method says of its own costs, without torch, is what it does with torch."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from luthier.core.shapes import BaseShape, Weight, read_shape
from luthier.methods import Workload, check_tuning, parse_tuning
from tests.tiny_methods import CASES, METHODS, Bench, Case, variants
from tests.tiny_shapes import SHAPES, facts_of

# SmolLM2-135M's published configuration.
_SMOLLM2 = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    tie_word_embeddings=True,
)


@pytest.fixture(scope="module")
def smollm2() -> LlamaForCausalLM:
    with torch.device("meta"):
        return LlamaForCausalLM(_SMOLLM2)


def _shape_of(model: LlamaForCausalLM) -> BaseShape:
    own = {id(one): Weight(tuple(one.shape)) for one in model.parameters()}
    named = model.named_parameters(remove_duplicate=False)
    return BaseShape(
        num_layers=30,
        hidden_size=576,
        num_heads=9,
        num_kv_heads=3,
        head_size=64,
        vocabulary_size=49152,
        is_transposed=False,
        is_llama=True,
        weights={name: own[id(one)] for name, one in named},
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_count_without_torch_is_the_count_with_it(bench: Bench, case: Case) -> None:
    method, params = case.settle()
    cost = method.cost(params, read_shape(bench.bases[case.shape]))
    assert cost.num_parameters == method.count_parameters(bench.load(case.shape), params)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_saved_numbers_are_as_many_as_are_said(bench: Bench, case: Case, tmp_path: Path) -> None:
    method, attached = bench.attach(case)
    _, params = case.settle()
    cost = method.cost(params, read_shape(bench.bases[case.shape]))
    method.save(attached, tmp_path)
    assert read_weights(tmp_path) == cost.num_saved


def read_weights(folder: Path) -> int:
    from safetensors.torch import load_file

    return sum(one.numel() for path in folder.glob("*.safetensors") for one in load_file(path).values())


@pytest.mark.parametrize(
    ("name", "tuning"), [(name, tuning) for name in METHODS for tuning in variants(name)], ids=str
)
def test_smollm2s_parameters_are_counted_exactly(
    smollm2: LlamaForCausalLM, name: str, tuning: dict[str, object]
) -> None:
    method, params = parse_tuning(check_tuning(tuning))
    params = method.resolve(params, Workload(facts_of("llama"), num_rows=500, num_tokens=50_000))
    expected = method.count_parameters(smollm2, params)
    assert method.cost(params, _shape_of(smollm2)).num_parameters == expected


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_read_from_files_has_every_weight_once(bench: Bench, name: str) -> None:
    shape, model = read_shape(bench.bases[name]), bench.load(name)
    assert shape.num_parameters == sum(one.numel() for one in model.parameters())
    assert shape.num_layers == model.config.get_text_config().num_hidden_layers
