"""The method object."""

from typing import Any

from luthier.methods import Method


def method_object(method: Method) -> dict[str, Any]:
    """Return a way to tune as clients see it; `parameters` is the JSON schema of a job's `tuning`."""
    return {
        "id": method.name,
        "object": "fine_tuning.method",
        "title": method.title,
        "parameters": method.Params.model_json_schema(),
        "is_whole_model": method.is_whole_model,
        "loads_in_peft": method.library_name == "peft",
    }
