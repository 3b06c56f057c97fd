"""Answers that are held to a form, asked by the SDK: a random model writes what the schema says."""

import json
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel

from tests.inference_server import CHAT, Served

ASKED: list[Any] = [{"role": "user", "content": "the sky"}]


class Colour(BaseModel):
    name: Literal["red", "green", "blue"]
    number: Literal[1, 22, 333]
    notes: list[bool]


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"enum": ["red", "green"]},
        "size": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "size"],
    "additionalProperties": False,
}


def form(schema: Any, **others: Any) -> Any:
    return {"type": "json_schema", "json_schema": {"name": "colour", "schema": schema, **others}}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_schema_is_kept_streamed_too_and_ends_the_answer(sdk: openai.OpenAI, temperature: float) -> None:
    options: Any = {"temperature": temperature, "seed": 3, "max_tokens": 100, "response_format": form(SCHEMA)}
    whole = sdk.chat.completions.create(model="m", messages=ASKED, n=3, **options)
    for choice in whole.choices:
        assert choice.finish_reason == "stop"
        value = json.loads(choice.message.content or "")
        assert value["name"] in {"red", "green"} and 0 <= value["size"] <= 99
    stream = sdk.chat.completions.create(model="m", messages=ASKED, stream=True, **options)
    texts = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert "".join(texts) == whole.choices[0].message.content and len(texts) > 5


def test_the_sdks_own_models_are_parsed_from_the_answer(sdk: openai.OpenAI) -> None:
    asked = sdk.chat.completions.parse(
        model="m",
        messages=ASKED,
        response_format=Colour,
        max_tokens=200,
        seed=1,
    )
    assert isinstance(asked.choices[0].message.parsed, Colour)


def test_a_json_object_that_is_cut_says_so_and_one_that_is_whole_is_json(served: Served) -> None:
    options: dict[str, Any] = {"response_format": {"type": "json_object"}, "temperature": 1.0}
    reasons = set()
    for seed in range(6):
        choice = served.chat("the sky", seed=seed, max_tokens=120, **options)["choices"][0]
        reasons.add(choice["finish_reason"])
        text = choice["message"]["content"]
        assert text.startswith("{")
        if choice["finish_reason"] == "stop":
            assert isinstance(json.loads(text), dict)
        else:
            with pytest.raises(ValueError):
                json.loads(text)
    assert reasons <= {"stop", "length"}


@pytest.mark.parametrize(
    ("response_format", "param"),
    [
        (form({"type": "widget"}), "response_format.json_schema.schema"),
        (form({"type": "object", "not": {}}), "response_format.json_schema.schema"),
        (form({"$ref": "http://127.0.0.1/x.json"}), "response_format.json_schema.schema"),
        ({"type": "json_schema"}, "response_format.json_schema"),
        ({"type": "json_schema", "json_schema": {"schema": SCHEMA}}, "response_format.json_schema.name"),
        (form(SCHEMA, strikt=True), "response_format.json_schema.strikt"),
        (form([]), "response_format.json_schema.schema"),
        ({"type": "xml"}, "response_format.type"),
        ("json_object", "response_format"),
    ],
)
def test_a_form_that_cannot_be_held_is_refused_by_the_name_of_its_field(
    served: Served, response_format: Any, param: str
) -> None:
    response = served.post(CHAT, messages=ASKED, response_format=response_format)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param)
