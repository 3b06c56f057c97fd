"""What a method says of its own costs, without torch, is what it does with torch."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from luthier.core.shapes import BaseShape, Weight, read_shape
from luthier.methods import Workload
from luthier.methods._tuning import check_tuning, parse_tuning
from tests.tiny_methods import CASES, METHODS, Bench, Case
from tests.tiny_shapes import SHAPES, facts_of

# The figures of the table of methods for SmolLM2-135M; `full` counts its vocabulary of 49,152 too.
FIGURES: list[tuple[dict[str, Any], int]] = [
    ({"type": "adapter", "bottleneck_dim": 64, "placement": "houlsby"}, 4_462_080),
    ({"type": "full"}, 134_515_008),
    ({"type": "lora", "rank": 8}, 2_442_240),
    ({"type": "prefix", "num_virtual_tokens": 20}, 230_400),
    ({"type": "prompt", "num_virtual_tokens": 20}, 11_520),
]

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


def _smollm2_shape() -> BaseShape:
    with torch.device("meta"):
        model = LlamaForCausalLM(_SMOLLM2)
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
def test_the_parameters_of_the_formula_are_trained_and_as_many_numbers_as_it_says_are_saved(
    bench: Bench, case: Case, tmp_path: Path
) -> None:
    method, attached = bench.attach(case)
    _, params = case.settle()
    cost = method.cost(params, read_shape(bench.bases[case.shape]))
    assert attached.num_trained_parameters == cost.num_parameters > 0
    method.save(attached, tmp_path)
    saved = [one for path in tmp_path.glob("*.safetensors") for one in load_file(path).values()]
    assert sum(one.numel() for one in saved) == cost.num_saved


def test_every_method_has_its_figure() -> None:
    """A new method brings its own, from the table of methods."""
    assert {tuning["type"] for tuning, _ in FIGURES} >= set(METHODS)


@pytest.mark.parametrize(("tuning", "expected"), FIGURES, ids=[tuning["type"] for tuning, _ in FIGURES])
def test_parameters_on_the_small_base_are_those_of_the_table(tuning: dict[str, Any], expected: int) -> None:
    method, params = parse_tuning(check_tuning(tuning))
    facts = facts_of("llama").model_copy(
        update={"hidden_size": 576, "num_layers": 30, "context_length": 8192}
    )
    params = method.resolve(params, Workload(facts, num_rows=500, num_tokens=50_000))
    assert method.cost(params, _smollm2_shape()).num_parameters == expected


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_read_from_files_has_every_weight_once(bench: Bench, name: str) -> None:
    shape, model = read_shape(bench.bases[name]), bench.load(name)
    assert shape.num_parameters == sum(one.numel() for one in model.parameters())
    assert shape.num_layers == model.config.get_text_config().num_hidden_layers
