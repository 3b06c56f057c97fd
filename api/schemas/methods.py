"""The method object."""

from typing import Any, Literal

from typing_extensions import TypedDict

from luthier.methods import Method


class MethodObject(TypedDict):
    """A way to tune."""

    id: str
    object: Literal["fine_tuning.method"]
    title: str
    parameters: dict[str, Any]
    is_whole_model: bool
    loads_in_peft: bool


def method_object(method: Method) -> MethodObject:
    """Return a way to tune as clients see it; `parameters` is the JSON schema of a job's `tuning`."""
    return {
        "id": method.name,
        "object": "fine_tuning.method",
        "title": method.title,
        "parameters": method.Params.model_json_schema(),
        "is_whole_model": method.is_whole_model,
        "loads_in_peft": method.library_name == "peft",
    }
