"""The page that lists every method's parameters, made from their JSON schemas:
`python -m luthier.methods._document > docs/methods-parameters.md`. A test holds the page equal to this.
"""

import json
import sys
from typing import Any

from luthier.methods.base import Method, discover

_HEAD = """# Parameters of the methods

Made by `python -m luthier.methods._document`; don't edit it by hand. `GET /v1/fine_tuning/methods` serves the
same as JSON schemas. All of it goes into a job's `tuning`, flat: `{"type": "lora", "rank": 8}`. A number that
is `"auto"` is chosen when the job is prepared and then shown. An unknown member is refused.
"""


def parameters_page() -> str:
    """Return the page as Markdown."""
    return "\n".join([_HEAD, *(_section(method) for method in discover().values())])


def _section(method: Method) -> str:
    lines = [f"## `{method.name}`", "", f"{method.title}. {_artifact(method)}", ""]
    lines += ["| parameter | values | default | what it is |", "|---|---|---|---|"]
    properties: dict[str, Any] = method.Params.model_json_schema()["properties"]
    for name, schema in properties.items():
        if name != "type":
            cells = [f"`{name}`", _values(schema), f"`{json.dumps(schema.get('default'))}`"]
            lines.append(f"| {' | '.join([*cells, _cell(schema.get('description', ''))])} |")
    return "\n".join([*lines, ""])


def _artifact(method: Method) -> str:
    if method.is_whole_model:
        return "The artifact is a whole model, which `AutoModelForCausalLM.from_pretrained` loads."
    if method.library_name == "peft":
        called = "" if method.loading == Method.loading else "; its card says how to call it"
        return f"The artifact loads in PEFT with `PeftModel.from_pretrained`{called}."
    return "The artifact does not load in PEFT; its card says how to load it."


_PLAIN = {"string": "text", "boolean": "`true`, `false`", "null": "`null`"}


def _values(schema: dict[str, Any]) -> str:
    """Return what a JSON schema takes, in words; a shape that is unknown here is shown as it is."""
    match schema:
        case {"anyOf": branches}:
            words = " or ".join(_values(branch) for branch in branches)
        case {"const": value}:
            words = f"`{json.dumps(value)}`"
        case {"enum": values}:
            words = ", ".join(f"`{json.dumps(value)}`" for value in values)
        case {"type": "integer" | "number" as kind}:
            words = ("whole number" if kind == "integer" else "number") + _range(schema)
        case {"type": "array", "items": items, "maxItems": most}:
            words = f"list of {_values(items)} ({schema.get('minItems', 0)} to {most})"
        case {"type": kind} if kind in _PLAIN:
            words = _PLAIN[kind]
        case _:
            words = f"`{json.dumps(schema)}`"
    return words


def _range(schema: dict[str, Any]) -> str:
    bounds = {
        "minimum": "from {}",
        "exclusiveMinimum": "above {}",
        "maximum": "to {}",
        "exclusiveMaximum": "below {}",
    }
    ranges = [words.format(schema[name]) for name, words in bounds.items() if name in schema]
    return " ".join(["", *ranges])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    sys.stdout.write(parameters_page())
