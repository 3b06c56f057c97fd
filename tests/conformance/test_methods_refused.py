"""Parameters that every method must refuse, found in its schema: unknown, out of range, of another type."""

from typing import Any

import pytest

from luthier.core.errors import InvalidRequestError, UnknownParameterError, UnsupportedValueError
from luthier.methods import discover
from luthier.methods._tuning import check_tuning
from tests.tiny_methods import METHODS, unsupported


def broken_values(name: str) -> list[tuple[str, Any]]:
    """Return parameters of a method with values that its schema rules out."""
    found: list[tuple[str, Any]] = []
    properties = discover()[name].Params.model_json_schema()["properties"]
    for field, schema in properties.items():
        if field == "type":
            continue
        branches = schema.get("anyOf", [schema])
        found += [(field, {"a": 1}), (field, [[]])]
        for branch in branches:
            found += [(field, value) for value in _beyond(branch)]
    return found


def _beyond(branch: dict[str, Any]) -> list[Any]:
    """Return values just outside a branch of a schema."""
    one = 1 if branch.get("type") == "integer" else 1e-6
    values: list[Any] = []
    if "minimum" in branch:
        values.append(branch["minimum"] - one)
    if "exclusiveMinimum" in branch:
        values.append(branch["exclusiveMinimum"])
    if "maximum" in branch:
        values.append(branch["maximum"] + one)
    if "exclusiveMaximum" in branch:
        values.append(branch["exclusiveMaximum"])
    if branch.get("type") in {"integer", "number"}:
        values += [True, float("nan")]
    if branch.get("type") == "boolean":
        values.append(1)
    if "enum" in branch:
        values.append("no such choice")
    if "maxLength" in branch:
        values.append("x" * (branch["maxLength"] + 1))
    if branch.get("minLength"):
        values.append("")
    if branch.get("minItems"):
        values.append([])
    return values


BROKEN = [(name, field, value) for name in METHODS for field, value in broken_values(name)]


@pytest.mark.parametrize("name", METHODS)
def test_an_unknown_parameter_is_refused_by_its_name(name: str) -> None:
    with pytest.raises(UnknownParameterError) as caught:
        check_tuning({"type": name, "colour": 1})
    assert caught.value.param == "tuning.colour"


@pytest.mark.parametrize(("name", "field", "value"), BROKEN)
def test_a_value_that_the_schema_rules_out_is_refused_by_field(name: str, field: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        check_tuning({"type": name, field: value})
    assert caught.value.param.split("[")[0].startswith(f"tuning.{field}")
    assert caught.value.code in {"invalid_value", "invalid_type", "unsupported_value"}


@pytest.mark.parametrize("name", METHODS)
def test_what_this_machine_cannot_do_is_refused_with_a_reason(name: str) -> None:
    for tuning in unsupported(name):
        with pytest.raises(UnsupportedValueError) as caught:
            check_tuning(tuning)
        assert caught.value.param in {f"tuning.{field}" for field in tuning}
        assert len(caught.value.message) > 40


@pytest.mark.parametrize("name", METHODS)
def test_every_number_takes_auto_and_every_parameter_is_described(name: str) -> None:
    for field, schema in discover()[name].Params.model_json_schema()["properties"].items():
        if field == "type":
            continue
        assert schema["description"], field
        branches = schema.get("anyOf", [schema])
        if any(branch.get("type") in {"integer", "number"} for branch in branches):
            assert {"const": "auto", "type": "string"} in branches, field
