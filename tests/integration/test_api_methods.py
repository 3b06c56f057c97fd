"""The methods resource: every method with a schema that says what a create accepts."""

import difflib
from typing import Any

import jsonschema
import pytest

from luthier.client import LuthierClient
from luthier.core.errors import LuthierError
from luthier.methods import discover
from luthier.methods._tuning import check_tuning
from tests.conftest import TINY_BASE, Api

pytestmark = pytest.mark.shared_api


@pytest.fixture
def methods(api: Api) -> dict[str, dict[str, Any]]:
    with LuthierClient(f"{api.base_url}/v1", api.key) as client:
        return {method["id"]: method for method in client.list_methods()}


def test_every_method_is_listed_with_title_and_schema(api: Api, methods: dict[str, dict[str, Any]]) -> None:
    answer = api.ok("GET", "/fine_tuning/methods")
    assert (answer["object"], answer["has_more"]) == ("list", False)
    assert list(methods) == list(discover())
    for name, method in methods.items():
        assert method["object"] == "fine_tuning.method"
        assert method["title"] == discover()[name].title
        properties = method["parameters"]["properties"]
        assert properties["type"]["const"] == name
        for field, schema in properties.items():
            assert "default" in schema, (name, field)
            assert field == "type" or schema["description"], (name, field)


def test_what_loads_in_peft_is_said(methods: dict[str, dict[str, Any]]) -> None:
    said = {name: method["loads_in_peft"] for name, method in methods.items()}
    assert said == {"adapter": False, "full": False, "lora": True, "prefix": True, "prompt": True}
    assert [name for name, method in methods.items() if method["is_whole_model"]] == ["full"]


def test_the_schema_and_the_check_agree(methods: dict[str, dict[str, Any]]) -> None:
    for name, method in methods.items():
        properties = method["parameters"]["properties"]
        filled = {field: schema["default"] for field, schema in properties.items()}
        # A default that only goes with another one is left out, as it is in a request.
        assert check_tuning({"type": name})["type"] == name
        jsonschema.validate(filled, method["parameters"])
        for wrong in ({**filled, "colour": 1}, {**filled, next(iter(set(filled) - {"type"})): {"a": 1}}):
            with pytest.raises(jsonschema.ValidationError):
                jsonschema.validate(wrong, method["parameters"])
            with pytest.raises(LuthierError):
                check_tuning(wrong)


def test_a_name_of_any_length_is_compared_by_its_first_characters(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare, lengths = difflib.get_close_matches, []

    def count(word: str, *arguments: Any, **options: Any) -> list[str]:
        lengths.append(len(word))
        return compare(word, *arguments, **options)

    monkeypatch.setattr(difflib, "get_close_matches", count)
    body = {"model": TINY_BASE, "training_file": "file-1", "tuning": {"type": "lora", "r" * 200_000: 1}}
    status, _, param, _ = api.refused("POST", "/fine_tuning/jobs", body)
    assert (status, str(param)[:10]) == (400, "tuning.rrr")
    assert lengths
    assert max(lengths) < 100
