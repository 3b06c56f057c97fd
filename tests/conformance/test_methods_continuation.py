"""Continuing from an artifact: a child starts as its parent, and what contradicts the parent is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch

from luthier.core.errors import ArtifactCorruptError, InvalidRequestError, InvalidValueError
from luthier.methods import Attached, Method, discover
from luthier.methods._tuning import inherit_tuning
from luthier.modeling.load import load_base
from tests.tiny_methods import CASES, LLAMA, METHODS, VARIANTS, Bench, Case, batch, variants
from tests.unit.inference.artifacts import add_noise

NAME = "ft:tiny:org::abcdefgh"
# Every method on every shape of base, and every variant on one of them.
PARENTS = [case for case in CASES if not discover()[case.tuning["type"]].is_whole_model]
PAIRS = [
    (Case(LLAMA, {"type": name}), tuning)
    for name in METHODS
    if not discover()[name].is_whole_model
    for tuning in variants(name)
]


def resolved(case: Case) -> dict[str, Any]:
    """Return the tuning that the parent's job ended up with."""
    return case.settle()[1].model_dump(mode="json")


def make_parent(bench: Bench, case: Case, folder: Path) -> tuple[Method, Attached]:
    """Write an artifact with weights that no freshly attached model has."""
    method, attached = bench.attach(case)
    add_noise(attached, seed=3, scale=0.3)
    method.save(attached, folder)
    return method, attached


def logits(method: Method, attached: Attached) -> torch.Tensor:
    with torch.no_grad():
        return method.logits(attached, batch(0, 1).token_ids_BT)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_says_in_its_own_file_which_parameters_shape_its_weights(name: str) -> None:
    method = discover()[name]
    assert "shaping_params" in vars(type(method))
    members = set(method.Params.model_fields) - {"type"}
    assert method.shaping_params | method.starting_params <= members
    assert not method.shaping_params & method.starting_params


@pytest.mark.parametrize("case", PARENTS, ids=str)
def test_a_child_starts_with_its_parents_logits_to_the_bit(bench: Bench, tmp_path: Path, case: Case) -> None:
    method, parent = make_parent(bench, case, tmp_path)
    _, child = bench.attach(case, seed=77)
    before = logits(method, child)
    method.take_weights(child, tmp_path)
    assert torch.equal(logits(method, child), logits(method, parent))
    assert not torch.allclose(before, logits(method, parent), atol=1e-3)
    again = method.load(bench.load(case.shape), tmp_path)
    assert torch.equal(logits(method, again), logits(method, child))


@pytest.mark.parametrize("name", [name for name in METHODS if discover()[name].is_whole_model])
def test_a_whole_model_as_the_base_has_the_same_logits(bench: Bench, tmp_path: Path, name: str) -> None:
    case = Case(LLAMA, {"type": name})
    method, parent = make_parent(bench, case, tmp_path)
    causal_lm = load_base(tmp_path, dtype=torch.float32, device="cpu")
    child = method.attach(causal_lm, case.settle()[1], bench.start(case, 77))
    assert torch.equal(logits(method, child), logits(method, parent))
    with pytest.raises(ArtifactCorruptError):
        method.take_weights(child, tmp_path)


@pytest.mark.parametrize("case", VARIANTS, ids=str)
def test_what_shapes_the_weights_is_inherited_and_need_not_be_said(case: Case) -> None:
    parent, method = resolved(case), discover()[case.tuning["type"]]
    for asked in ({}, {"type": method.name}, dict.fromkeys(_numbers(method, parent), "auto")):
        found = inherit_tuning(asked, parent, name=NAME)
        kept = ("type", *method.shaping_params, *method.starting_params)
        assert {member: found[member] for member in kept} == {member: parent[member] for member in kept}
    # All that the parent's own job had said may be said again.
    assert inherit_tuning(parent, parent, name=NAME) == parent


@pytest.mark.parametrize(("case", "tuning"), PAIRS, ids=str)
def test_another_variant_continues_from_the_same_logits_or_is_refused_by_the_member_that_contradicts(
    bench: Bench, tmp_path: Path, case: Case, tuning: dict[str, Any]
) -> None:
    method, parent = make_parent(bench, case, tmp_path)
    other = Case(LLAMA, tuning)
    try:
        inherited = inherit_tuning(tuning, resolved(case), name=NAME)
    except InvalidRequestError as error:
        assert isinstance(error, InvalidValueError)
        refused = str(error.param).removeprefix("tuning.")
        assert refused in method.shaping_params | method.starting_params
        assert refused in tuning
        assert NAME in error.message
        if refused in method.shaping_params:
            _assert_another_model(bench, method, parent, other, tmp_path)
        return
    _, child = bench.attach(Case(LLAMA, inherited), seed=77)
    method.take_weights(child, tmp_path)
    assert torch.equal(logits(method, child), logits(method, parent))


def _assert_another_model(bench: Bench, method: Method, parent: Attached, other: Case, folder: Path) -> None:
    """Its weights can't be taken there, or mean something else there: the refusal was for a reason."""
    _, child = bench.attach(other, seed=77)
    try:
        method.take_weights(child, folder)
    except ArtifactCorruptError:
        return
    assert not torch.allclose(logits(method, child), logits(method, parent), atol=1e-4)


def _numbers(method: Method, parent: dict[str, Any]) -> list[str]:
    return [
        member
        for member in method.shaping_params
        if isinstance(parent[member], int | float) and not isinstance(parent[member], bool)
    ]


@pytest.mark.parametrize("name", METHODS)
def test_another_number_contradicts_and_both_are_said(name: str) -> None:
    parent, method = resolved(Case(LLAMA, {"type": name})), discover()[name]
    for member in _numbers(method, parent):
        with pytest.raises(InvalidValueError) as caught:
            inherit_tuning({member: parent[member] - 1}, parent, name=NAME)
        assert caught.value.param == f"tuning.{member}"
        assert caught.value.message == (
            f"tuning.{member}: {parent[member] - 1} contradicts the {parent[member]} of {NAME}; leave it out."
        )


@pytest.mark.parametrize("name", METHODS)
def test_another_method_contradicts_and_an_unknown_member_is_refused(name: str) -> None:
    parent = resolved(Case(LLAMA, {"type": name}))
    other = next(one for one in METHODS if one != name)
    for asked, param in (({"type": other}, "tuning.type"), ({"colour": 1}, "tuning.colour")):
        with pytest.raises(InvalidRequestError) as caught:
            inherit_tuning(asked, parent, name=NAME)
        assert caught.value.param == param
