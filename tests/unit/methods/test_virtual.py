"""The parameters of prefix and prompt tuning: what belongs together, and what "auto" becomes; peak rates."""

from typing import Any

import pytest

from luthier.core.errors import InvalidValueError, MissingParameterError
from luthier.core.specs import BaseFacts
from luthier.methods import MethodParams, Workload
from luthier.methods._tuning import check_tuning, parse_tuning
from tests.tiny import make_facts


def facts(**changes: int) -> BaseFacts:
    return make_facts(**{"context_length": 2048, "hidden_size": 576} | changes)


def resolve(tuning: dict[str, Any], num_rows: int = 500, **base: int) -> MethodParams:
    method, params = parse_tuning(check_tuning(tuning))
    return method.resolve(params, Workload(facts(**base), num_rows, num_rows * 90))


def rate(kind: str, **base: int) -> float:
    """Return the peak rate of "auto", by what was measured (docs/methods.md) or is usual."""
    method, params = parse_tuning(check_tuning({"type": kind}))
    return method.base_learning_rate(params, base=facts(**base))


both = pytest.mark.parametrize("name", ["prefix", "prompt"])


@both
def test_a_text_start_needs_its_text_and_no_other_start_takes_one(name):
    with pytest.raises(MissingParameterError) as missing:
        check_tuning({"type": name, "init": "text"})
    assert missing.value.param == "tuning.init_text"
    for start in ({"init": "random"}, {}):
        with pytest.raises(InvalidValueError) as caught:
            check_tuning({"type": name, "init_text": "a"} | start)
        assert caught.value.param == "tuning.init_text"
    checked = check_tuning({"type": name, "init": "text", "init_text": "a"})
    assert check_tuning(checked) == checked


@both
def test_the_default_start_is_a_real_one(name):
    assert check_tuning({"type": name})["init"] == {"prefix": "examples", "prompt": "vocabulary"}[name]


@pytest.mark.parametrize(("name", "expected"), [("prefix", [16, 32, 32, 64]), ("prompt", [100] * 4)])
def test_rows_and_a_short_context_decide_how_many_virtual_tokens_there_are(name, expected):
    assert [resolve({"type": name}, num_rows=n).num_virtual_tokens for n in (99, 100, 1999, 2000)] == expected
    assert resolve({"type": name}, num_rows=50_000, context_length=64).num_virtual_tokens == 8
    assert resolve({"type": name}, context_length=4).num_virtual_tokens == 1
    assert resolve({"type": name, "num_virtual_tokens": 3}).num_virtual_tokens == 3


@both
def test_virtual_tokens_that_fill_the_context_are_refused(name):
    assert resolve({"type": name, "num_virtual_tokens": 63}, context_length=64).num_virtual_tokens == 63
    with pytest.raises(InvalidValueError, match="64") as caught:
        resolve({"type": name, "num_virtual_tokens": 64}, context_length=64)
    assert caught.value.param == "tuning.num_virtual_tokens"


def test_a_projection_gets_a_width_and_only_a_projection_has_one():
    assert resolve({"type": "prefix"}).projection_dim is None
    assert resolve({"type": "prefix", "projection": True}).projection_dim == 512
    assert resolve({"type": "prefix", "projection": True}, hidden_size=64).projection_dim == 64
    assert resolve({"type": "prefix", "projection": True, "projection_dim": 5}).projection_dim == 5
    with pytest.raises(InvalidValueError) as caught:
        check_tuning({"type": "prefix", "projection_dim": 5})
    assert caught.value.param == "tuning.projection_dim"


@pytest.mark.parametrize(
    "tuning", [{"type": "prefix"}, {"type": "prompt"}, {"type": "prefix", "projection": True}]
)
def test_resolved_parameters_hold_no_auto_and_check_to_themselves(tuning):
    resolved = resolve(tuning).model_dump(mode="json")
    assert "auto" not in resolved.values()
    assert check_tuning(resolved) == resolved


@pytest.mark.parametrize(
    ("kind", "hidden_size", "expected"),
    [("full", 576, 5e-5), ("full", 4096, 2e-5), ("prompt", 576, 0.3), ("prompt", 4096, 0.1)],
)
def test_a_rate_depends_on_the_method_and_the_width(kind, hidden_size, expected):
    assert rate(kind, hidden_size=hidden_size) == expected


def test_a_prompt_learns_faster_than_lora():
    assert rate("prompt") > 5 * rate("lora")
