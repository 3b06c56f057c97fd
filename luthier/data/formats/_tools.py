"""Tools: their definitions and the assistant's calls of them, as OpenAI writes both, checked rule by rule."""

import json
import re
from typing import Any, NoReturn

from luthier.data.formats.base import Broken, ToolCall, check_keys, check_type

MAX_TOOLS = 128
# A row with this many broken rules is checked no further.
MAX_BROKEN = 20
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_NAME_RULE = "it has letters, digits, _ and -, at most 64 of them."
_OPTIONAL: dict[str, tuple[type, str]] = {
    "description": (str, "a string"),
    "parameters": (dict, "an object, a JSON schema"),
    "strict": (bool, "true or false"),
}


def check_definitions(row: dict[str, Any], prefix: str = "") -> list[Broken]:
    """Check the tools of a row, `tools` or the older `functions`; their fields begin with `prefix`."""
    tools, functions = row.get("tools"), row.get("functions")
    if tools is not None and functions is not None:
        message = '"functions" is the older spelling of "tools": a row has one of them.'
        return [(f"{prefix}functions", "tools.twice", message)]
    key = "functions" if tools is None else "tools"
    given = functions if tools is None else tools
    if given is None:
        return []
    if not isinstance(given, list) or len(given) > MAX_TOOLS:
        return [(f"{prefix}{key}", "tools.type", f'"{key}" must be a list of at most {MAX_TOOLS}.')]
    broken: list[Broken] = []
    names: set[str] = set()
    for place, item in enumerate(given):
        if len(broken) >= MAX_BROKEN:
            break
        path = f"{prefix}{key}[{place}]"
        function = item
        if key == "tools":
            broken += _check_tool(item, path)
            path, function = f"{path}.function", item.get("function") if isinstance(item, dict) else None
        else:
            broken += _check_function(function, path)
        name = function.get("name") if isinstance(function, dict) else None
        if isinstance(name, str):
            if name in names:
                broken.append((f"{path}.name", "tool.name_twice", "Two tools have this name; rename one."))
            names.add(name)
    return broken


def _check_tool(tool: Any, path: str) -> list[Broken]:
    if not isinstance(tool, dict) or tool.get("type") != "function":
        return [(path, "tool.type", 'A tool must be {"type": "function", "function": {...}}.')]
    advice = "a tool has type and function."
    broken = check_keys(tool, ("type", "function"), f"{path}.", "tool.unknown_key", advice)
    return broken + _check_function(tool.get("function"), f"{path}.function")


def _check_function(function: Any, path: str) -> list[Broken]:
    if not isinstance(function, dict):
        return [(path, "tool.function", "A function must be an object with a name and parameters.")]
    advice = "a function has name, description, parameters and strict."
    broken = check_keys(function, ("name", *_OPTIONAL), f"{path}.", "tool.unknown_key", advice)
    broken += check_name(function.get("name"), f"{path}.name")
    for key, (kind, what) in _OPTIONAL.items():
        broken += check_type(function, key, kind, f"{path}.", f"tool.{key}", what)
    return broken


def check_name(name: Any, path: str) -> list[Broken]:
    if not isinstance(name, str):
        return [(path, "tool.name", f"A tool's name must be a string: {_NAME_RULE}")]
    if _NAME.fullmatch(name) is None:
        return [(path, "tool.name", f"This is no name of a tool: {_NAME_RULE}")]
    return []


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(name)


def check_arguments(arguments: Any, path: str) -> list[Broken]:
    """Check the arguments of a call: a string that holds a JSON object."""
    if not isinstance(arguments, str):
        message = '"arguments" must be a string that holds a JSON object, such as "{\\"city\\": \\"Oslo\\"}".'
        return [(path, "tool_call.arguments", message)]
    try:
        value = json.loads(arguments, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        message = 'The text of "arguments" is no JSON object; a call without arguments has "{}".'
        return [(path, "tool_call.arguments", message)]
    return []


def check_calls(calls: Any, path: str) -> list[Broken]:
    """Check the `tool_calls` of an assistant's message, each by itself."""
    if not isinstance(calls, list) or not calls:
        return [(path, "tool_calls.type", '"tool_calls" must be a list with at least one call.')]
    broken: list[Broken] = []
    for place, call in enumerate(calls):
        if len(broken) >= MAX_BROKEN:
            break
        broken += _check_call(call, f"{path}[{place}]")
    return broken


def _check_call(call: Any, path: str) -> list[Broken]:
    if not isinstance(call, dict):
        return [(path, "tool_call.type", "A tool call must be an object with id, type and function.")]
    advice = "a call has id, type, function."
    broken = check_keys(call, ("id", "type", "function"), f"{path}.", "tool_call.unknown_key", advice)
    if not isinstance(call.get("id"), str) or not call["id"]:
        message = '"id" must be a string that is not empty; the tool\'s message names it.'
        broken.append((f"{path}.id", "tool_call.id", message))
    if call.get("type") != "function":
        broken.append((f"{path}.type", "tool_call.type", 'The type of a call must be "function".'))
    return broken + check_called(call.get("function"), f"{path}.function")


def check_called(function: Any, path: str) -> list[Broken]:
    """Check what is called: a name and arguments, also the older `function_call`."""
    if not isinstance(function, dict):
        return [(path, "tool_call.function", "A call must name its function: an object, name and arguments.")]
    advice = "it has name and arguments."
    broken = check_keys(function, ("name", "arguments"), f"{path}.", "tool_call.unknown_key", advice)
    broken += check_name(function.get("name"), f"{path}.name")
    return broken + check_arguments(function.get("arguments"), f"{path}.arguments")


def to_definitions(row: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Return the tools of a checked row, the older `functions` in the newer shape; None without any."""
    tools: list[dict[str, Any]] | None = row.get("tools")
    if tools is None and row.get("functions") is not None:
        tools = [{"type": "function", "function": function} for function in row["functions"]]
    return tools or None


def to_call(id_: str, function: dict[str, Any]) -> ToolCall:
    return ToolCall(id_, function["name"], json.loads(function["arguments"]))
