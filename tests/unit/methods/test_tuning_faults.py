"""An error names the field's path, whatever the shape of a method's parameters."""

from typing import Annotated, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from luthier.core.errors import (
    InvalidTypeError,
    InvalidValueError,
    LuthierError,
    MissingParameterError,
    UnknownParameterError,
    UnsupportedValueError,
)
from luthier.methods import discover
from luthier.methods._tuning import check_tuning, first_fault
from luthier.methods.base import MethodParams


class _Inner(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    width: Annotated[int, Field(ge=1)]
    kind: Literal["a", "b"] = "a"


class _Params(MethodParams):
    type: Literal["made-up"] = "made-up"
    rank: Annotated[int, Field(ge=1, le=256)] | Literal["auto"] = "auto"
    names: str | Annotated[list[str], Field(min_length=1)] = "all"
    inner: _Inner | Literal["auto"] | None = None
    layers: dict[str, Annotated[int, Field(ge=1)]] = Field({})


@pytest.mark.parametrize(
    ("tuning", "error", "param"),
    [
        ({"rank": 0}, InvalidValueError, "tuning.rank"),
        ({"rank": [1]}, InvalidTypeError, "tuning.rank"),
        ({"names": 3}, InvalidTypeError, "tuning.names"),
        ({"names": []}, InvalidValueError, "tuning.names"),
        ({"names": ["q", 3]}, InvalidTypeError, "tuning.names.1"),
        ({"inner": {"width": 0}}, InvalidValueError, "tuning.inner.width"),
        ({"inner": {"width": "wide"}}, InvalidValueError, "tuning.inner.width"),
        ({"inner": {"width": 1, "kind": "c"}}, InvalidValueError, "tuning.inner.kind"),
        ({"inner": {"width": 1, "colour": 2}}, UnknownParameterError, "tuning.inner.colour"),
        ({"inner": {}}, MissingParameterError, "tuning.inner.width"),
        ({"inner": "always"}, InvalidValueError, "tuning.inner"),
        ({"layers": {"first": 0}}, InvalidValueError, "tuning.layers.first"),
        ({"colour": {"deep": 1}}, UnknownParameterError, "tuning.colour"),
        ({"a\nb" + "c" * 90: 1}, UnknownParameterError, "tuning.a\\nb" + "c" * 36),
    ],
)
def test_a_fault_is_reported_by_its_path(tuning, error, param):
    with pytest.raises(ValidationError) as caught:
        _Params.model_validate(tuning)
    fault = first_fault(caught.value, tuning, list(_Params.model_fields))
    assert (type(fault), fault.param) == (error, param), fault.message


@pytest.mark.parametrize("name", discover())
def test_every_method_names_its_own_fields(name):
    with pytest.raises(UnknownParameterError) as caught:
        check_tuning({"type": name, "colour": 1})
    assert caught.value.param == "tuning.colour"
    fields = set(discover()[name].Params.model_fields) - {"type"}
    for field in fields:
        with pytest.raises(LuthierError) as wrong:
            check_tuning({"type": name, field: {"surprise": 1}})
        assert wrong.value.param == f"tuning.{field}", field


@pytest.mark.parametrize("value", ["int8", "nf4"])
def test_quantised_bases_are_refused_with_the_reason(value):
    with pytest.raises(UnsupportedValueError, match="CUDA"):
        check_tuning({"quantization": value})
    with pytest.raises(InvalidValueError):
        check_tuning({"quantization": "int2"})
