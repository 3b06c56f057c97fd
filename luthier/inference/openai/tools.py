"""The tools of a request and how they may be called, checked. Parses only; knows no template."""

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from luthier.core.errors import InvalidTypeError, InvalidValueError, UnsupportedValueError
from luthier.inference.openai.fields import validate, without_nulls

NAME_PATTERN = r"^[a-zA-Z0-9_-]{1,64}$"
_MAX_TOOLS = 128
TOOL_FIELDS = frozenset({"tools", "tool_choice", "parallel_tool_calls"})


@dataclass(frozen=True)
class Tool:
    """A function that the model may call.

    `definition` is what templates render, as OpenAI's chats and training rows write it; `param` is the field
    that holds its parameters.
    """

    name: str
    parameters: dict[str, Any] | None
    is_strict: bool
    definition: dict[str, Any]
    param: str


@dataclass(frozen=True)
class Tools:
    """The tools of a request.

    `mode` says whether calls may, must or must not come; `name` is the one function that must be called,
    None where any may.
    """

    tools: tuple[Tool, ...] = ()
    mode: Literal["none", "auto", "required"] = "auto"
    name: str | None = None
    is_parallel: bool = True

    @property
    def offered(self) -> tuple[Tool, ...]:
        """The tools in the prompt; none where the model may not call any."""
        return () if self.mode == "none" else self.tools

    @property
    def callable(self) -> tuple[Tool, ...]:
        """The tools of which one may come in a call."""
        return tuple(tool for tool in self.offered if self.name in {None, tool.name})


class _Function(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    name: str = Field(pattern=NAME_PATTERN)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool = False


class _Tool(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["function"]
    function: _Function


class _Named(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    name: str


class _NamedChoice(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["function"]
    function: _Named


def read_tools(fields: dict[str, Any], *, is_nested: bool = True) -> Tools:
    """Check `tools`, `tool_choice` and `parallel_tool_calls` and take them out of the fields.

    Args:
        is_nested: whether tools and choice have an object around what names their function, as chats do;
            those of responses do not.

    Raises:
        InvalidRequestError: naming the field that breaks a rule.
    """
    read = _read_nested_tool if is_nested else _read_flat_tool
    tools = tuple(read(item, f"tools.{i}") for i, item in enumerate(_pop_list(fields)))
    choice, name = fields.pop("tool_choice", None), None
    if isinstance(choice, dict):
        _refuse_other_types(choice, "tool_choice")
        if is_nested:
            name = validate(_NamedChoice, without_nulls(choice), "tool_choice.").function.name
        else:
            given = {key: value for key, value in choice.items() if key != "type"}
            name = validate(_Named, given, "tool_choice.").name
    name_param = "tool_choice.function.name" if is_nested else "tool_choice.name"
    return _choose(tools, choice, name, fields, name_param)


def _pop_list(fields: dict[str, Any]) -> list[Any]:
    tools = fields.pop("tools", [])
    if not isinstance(tools, list):
        raise InvalidTypeError("tools must be a list.", param="tools")
    if len(tools) > _MAX_TOOLS:
        raise InvalidValueError(f"There may be {_MAX_TOOLS} tools at most.", param="tools")
    return tools


def _refuse_other_types(item: Any, param: str) -> None:
    if not isinstance(item, dict):
        raise InvalidTypeError('A tool must be an object with "type": "function".', param=param)
    if isinstance(item.get("type"), str) and item["type"] != "function":
        raise UnsupportedValueError(
            "Only functions are supported by this server: no custom, built-in or allowed_tools types.",
            param=f"{param}.type",
        )


def _read_nested_tool(item: Any, param: str) -> Tool:
    _refuse_other_types(item, param)
    given = without_nulls(item)
    if isinstance(given.get("function"), dict):
        given["function"] = without_nulls(given["function"])
    function = validate(_Tool, given, f"{param}.").function
    # The model sees the definition as its training rows have it: as it was written.
    return Tool(function.name, function.parameters, function.strict, item, f"{param}.function.parameters")


def _read_flat_tool(item: Any, param: str) -> Tool:
    """Return a tool of a response, its definition as chats write it."""
    _refuse_other_types(item, param)
    given = {key: value for key, value in without_nulls(item).items() if key != "type"}
    function = validate(_Function, given, f"{param}.")
    definition = {"type": "function", "function": given}
    return Tool(function.name, function.parameters, function.strict, definition, f"{param}.parameters")


def _choose(
    tools: tuple[Tool, ...], choice: Any, name: str | None, fields: dict[str, Any], name_param: str
) -> Tools:
    names = [tool.name for tool in tools]
    for i, given in enumerate(names):
        if given in names[:i]:
            raise InvalidValueError("Two tools have this name; rename one.", param=f"tools.{i}")
    is_parallel = fields.pop("parallel_tool_calls", True)
    if not isinstance(is_parallel, bool):
        raise InvalidTypeError("parallel_tool_calls must be true or false.", param="parallel_tool_calls")
    if name is None and choice not in {None, "none", "auto", "required"}:
        raise InvalidValueError(
            "tool_choice must be none, auto, required or an object that names a function.",
            param="tool_choice",
        )
    if not tools and choice not in {None, "none", "auto"}:
        raise InvalidValueError("tool_choice needs tools.", param="tool_choice")
    if not tools:
        return Tools()
    if name is None:
        return Tools(tools, choice or "auto", None, is_parallel)
    if name not in names:
        raise InvalidValueError("tool_choice names a function that is not among the tools.", param=name_param)
    # OpenAI's API answers a named function with one call of it.
    return Tools(tools, "required", name, is_parallel=False)
