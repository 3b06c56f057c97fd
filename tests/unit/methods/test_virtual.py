"""The parameters of prefix and prompt tuning: what belongs together, and what "auto" becomes."""

from typing import Any

import pytest

from luthier.core.errors import InvalidValueError, MissingParameterError
from luthier.core.specs import BaseFacts
from luthier.methods import MethodParams, Workload
from luthier.methods._tuning import check_tuning, parse_tuning


def facts(context_length: int = 2048, hidden_size: int = 576) -> BaseFacts:
    return BaseFacts(
        id="b",
        source="path:/b",
        licence="mit",
        digest="sha256:1",
        tokenizer_digest="sha256:2",
        context_length=context_length,
        num_parameters=1,
        num_layers=2,
        hidden_size=hidden_size,
    )


def resolve(tuning: dict[str, Any], num_rows: int = 500, **base: int) -> MethodParams:
    method, params = parse_tuning(check_tuning(tuning))
    return method.resolve(params, Workload(facts(**base), num_rows, num_rows * 90))


@pytest.mark.parametrize("name", ["prefix", "prompt"])
def test_a_text_start_needs_its_text_and_no_other_start_takes_one(name: str) -> None:
    with pytest.raises(MissingParameterError) as missing:
        check_tuning({"type": name, "init": "text"})
    assert missing.value.param == "tuning.init_text"
    with pytest.raises(InvalidValueError) as caught:
        check_tuning({"type": name, "init": "random", "init_text": "a"})
    assert caught.value.param == "tuning.init_text"
    with pytest.raises(InvalidValueError) as caught:
        check_tuning({"type": name, "init_text": "a"})
    assert caught.value.param == "tuning.init_text"
    checked = check_tuning({"type": name, "init": "text", "init_text": "a"})
    assert check_tuning(checked) == checked


@pytest.mark.parametrize("name", ["prefix", "prompt"])
def test_the_default_start_is_a_real_one(name: str) -> None:
    assert check_tuning({"type": name})["init"] == {"prefix": "examples", "prompt": "vocabulary"}[name]


@pytest.mark.parametrize(("name", "expected"), [("prefix", [16, 32, 32, 64]), ("prompt", [100] * 4)])
def test_rows_and_a_short_context_decide_how_many_virtual_tokens_there_are(
    name: str, expected: list[int]
) -> None:
    assert [resolve({"type": name}, num_rows=n).num_virtual_tokens for n in (99, 100, 1999, 2000)] == expected
    assert resolve({"type": name}, num_rows=50_000, context_length=64).num_virtual_tokens == 8
    assert resolve({"type": name}, context_length=4).num_virtual_tokens == 1
    assert resolve({"type": name, "num_virtual_tokens": 3}).num_virtual_tokens == 3


@pytest.mark.parametrize("name", ["prefix", "prompt"])
def test_virtual_tokens_that_fill_the_context_are_refused(name: str) -> None:
    assert resolve({"type": name, "num_virtual_tokens": 63}, context_length=64).num_virtual_tokens == 63
    with pytest.raises(InvalidValueError, match="64") as caught:
        resolve({"type": name, "num_virtual_tokens": 64}, context_length=64)
    assert caught.value.param == "tuning.num_virtual_tokens"


def test_a_projection_gets_a_width_and_only_a_projection_has_one() -> None:
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
def test_resolved_parameters_hold_no_auto_and_check_to_themselves(tuning: dict[str, Any]) -> None:
    resolved = resolve(tuning).model_dump(mode="json")
    assert "auto" not in resolved.values()
    assert check_tuning(resolved) == resolved


def test_a_prompt_learns_faster_than_lora() -> None:
    rates = {}
    for name in ("lora", "prompt"):
        method, params = parse_tuning(check_tuning({"type": name}))
        rates[name] = method.base_learning_rate(params, base=facts())
    assert rates["prompt"] > 5 * rates["lora"]
