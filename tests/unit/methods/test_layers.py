"""Choosing layers by group, name or pattern."""

import pytest

from luthier.core.errors import InvalidValueError
from luthier.methods._layers import choose_layers, shortest_names
from luthier.methods._tuning import check_tuning

LLAMA = {
    f"model.layers.{i}.{name}": (8, 8)
    for i in range(2)
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
}
GPT2 = {
    f"transformer.h.{i}.{name}": (8, 8)
    for i in range(2)
    for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
}


@pytest.mark.parametrize("shapes", [LLAMA, GPT2])
def test_attention_and_mlp_together_are_all_linear_layers(shapes):
    attention, feed_forward = choose_layers(shapes, "attention"), choose_layers(shapes, "mlp")
    assert len(attention) == len(feed_forward) == 4
    assert {**attention, **feed_forward} == choose_layers(shapes, "all-linear") == shapes


def test_a_list_picks_by_the_end_of_the_path_only():
    assert len(choose_layers(LLAMA, ["q_proj"])) == 2
    with pytest.raises(InvalidValueError):
        choose_layers(LLAMA, ["proj"])


def test_a_pattern_must_match_the_whole_path():
    assert list(choose_layers(LLAMA, r".*\.0\..*q_proj")) == ["model.layers.0.self_attn.q_proj"]
    with pytest.raises(InvalidValueError) as caught:
        choose_layers(LLAMA, "q_proj")
    assert caught.value.param == "tuning.target_modules"
    assert "q_proj" in caught.value.message
    assert "up_proj" in caught.value.message


def test_one_unknown_name_among_known_ones_is_refused():
    with pytest.raises(InvalidValueError, match="qq_proj"):
        choose_layers(LLAMA, ["q_proj", "qq_proj"])


def test_names_are_as_short_as_they_can_be_and_no_shorter():
    assert shortest_names(choose_layers(LLAMA, "mlp"), LLAMA) == ["down_proj", "up_proj"]
    assert shortest_names(choose_layers(GPT2, "attention"), GPT2) == ["attn.c_attn", "attn.c_proj"]
    one = choose_layers(LLAMA, r".*\.0\..*q_proj")
    assert shortest_names(one, LLAMA) == ["0.self_attn.q_proj"]


_PATTERNS = [r".*\.(q|v)_proj", r"(.*\.)?q_proj", r"[(+*]+a\(b+\)*", r"(?:model|h)\.\d{1,2}\.[]+*]x"]


@pytest.mark.parametrize("pattern", [*_PATTERNS, "[^]()*+]*(a{2}b)+"])
def test_patterns_that_compile_are_taken(pattern):
    assert check_tuning({"target_modules": pattern})["target_modules"] == pattern


def test_matching_ends_even_where_the_pattern_would_not():
    shapes = {f"model.layers.{i}.{'long_name_' * 9}": (8, 8) for i in range(3)}
    with pytest.raises(InvalidValueError, match="simpler") as caught:
        choose_layers(shapes, r"(?:(?:.|..)+)+(?<!e_)")
    assert caught.value.param == "tuning.target_modules"


@pytest.mark.parametrize("pattern", ["(", "[a", "(" * 5000 + ")" * 5000])
def test_a_pattern_that_does_not_compile_is_refused_before_any_job(pattern):
    with pytest.raises(InvalidValueError) as caught:
        check_tuning({"target_modules": pattern})
    assert caught.value.param == "tuning.target_modules"
