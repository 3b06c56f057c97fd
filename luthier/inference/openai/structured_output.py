"""Which grammar a chat's answer is held to: that of its form, of calls of its tools, or none."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from luthier.core.errors import InvalidTypeError, InvalidValueError, UnsupportedValueError
from luthier.data.rendering.tokenizer import Tokenizer
from luthier.inference.openai.fields import validate, without_nulls
from luthier.inference.openai.grammar import CompiledGrammar, SchemaBudget, json_rule
from luthier.inference.openai.tool_calls import CallSyntax
from luthier.inference.openai.tools import NAME_PATTERN, Tool, Tools

_ANY_TEXT = r"/(.|\n)*/"


@dataclass(frozen=True)
class AnswerFormat:
    """An answer that must be JSON of a schema. `param` is the field that holds the schema."""

    schema: dict[str, Any]
    param: str

    def to_rule(self) -> str:
        """Return the right side of the answer's rule in a grammar."""
        return json_rule(self.schema, param=self.param)


class _Plain(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["text", "json_object"]


class _Schema(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    name: str = Field(pattern=NAME_PATTERN)
    schema_: dict[str, Any] = Field({"type": "object"}, alias="schema")
    description: str | None = None
    # Every schema is enforced, whether strict or not.
    strict: bool = False


class _ChatSchema(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["json_schema"]
    json_schema: dict[str, Any]


def read_format(value: Any, param: str, *, is_nested: bool) -> AnswerFormat | None:
    """Check the form that answers shall have.

    Args:
        is_nested: whether there is an object around a schema, as in a chat's `response_format`; there is none
            in a response's `text.format`.

    Returns:
        The form, None where the text is free.

    Raises:
        InvalidRequestError: naming the field that breaks a rule.
    """
    if not isinstance(value, dict):
        raise InvalidTypeError(f'{param} must be an object, such as {{"type": "json_object"}}.', param=param)
    fields = without_nulls(value)
    kind = fields.get("type")
    if kind == "json_schema":
        if is_nested:
            given = without_nulls(validate(_ChatSchema, fields, f"{param}.").json_schema)
            param = f"{param}.json_schema"
        else:
            given = {name: one for name, one in fields.items() if name != "type"}
        return AnswerFormat(validate(_Schema, given, f"{param}.").schema_, f"{param}.schema")
    if isinstance(kind, str) and kind not in {"text", "json_object"}:
        raise UnsupportedValueError(
            "The format must be text, json_object or json_schema.", param=f"{param}.type"
        )
    if validate(_Plain, fields, f"{param}.").type == "text":
        return None
    return AnswerFormat({"type": "object"}, f"{param}.type")


# Compiles a grammar on behalf of a field.
Compile = Callable[[str, str], CompiledGrammar]


def choose_grammar(
    answer: AnswerFormat | None,
    tools: Tools,
    syntax: CallSyntax | None,
    tokenizer: Tokenizer,
    compile_grammar: Compile,
) -> CompiledGrammar | None:
    """Choose the grammar of an answer and compile it.

    Args:
        answer: the form that it shall have, if any.
        tools: what it may or must call.
        syntax: how the base writes calls, None where that is unknown.
        compile_grammar: compiles a grammar; its second argument is the field that an error names.

    Returns:
        The grammar, None where the answer is free.

    Raises:
        InvalidValueError: when a schema can't be enforced, or calls are required and their syntax is unknown.
    """
    must_call = tools.mode == "required"
    budget = SchemaBudget()
    if answer is not None:
        budget.take(answer.schema, param=answer.param)
    if syntax is None or not tools.callable:
        if must_call:
            raise InvalidValueError(
                "This model's chat template does not show how calls are written, so none can be required; "
                "use tool_choice auto.",
                param="tool_choice",
            )
        return None if answer is None else compile_grammar(f"start: {answer.to_rule()}", answer.param)
    is_marked_strict = bool(syntax.begin.strip()) and any(tool.is_strict for tool in tools.callable)
    if not must_call and answer is None and not is_marked_strict:
        return None
    if answer is not None:
        # Alone first, so that an error names the tool.
        compile_grammar(f"start: {answer.to_rule()}", answer.param)
    enforced = _enforceable(tools.callable, budget, compile_grammar)
    rules = partial(_call_rules, tools=enforced, tokenizer=tokenizer, is_parallel=tools.is_parallel)
    if must_call:
        lark = f"start: calls\n{rules(syntax)}"
    elif answer is not None:
        lark = f"start: calls | answer\nanswer: {answer.to_rule()}\n{rules(syntax)}"
    else:
        mark = syntax.begin.strip()
        after = syntax.begin[syntax.begin.index(mark) + len(mark) :]
        quoted = _literal(mark, tokenizer)
        # A text up to a mark of letters is one lexeme, found as soon as it ends; a mark of its own stands
        # alone.
        lazily = f"opening[lazy]: {_ANY_TEXT} {quoted}"
        opening = lazily if quoted.startswith('"') else f"opening: TEXT {quoted}"
        calls = rules(replace(syntax, begin=after))
        lark = f"start: TEXT | opening calls\nTEXT: {_ANY_TEXT}\n{opening}\n{calls}"
    return compile_grammar(lark, "tools")


def _enforceable(tools: Sequence[Tool], budget: SchemaBudget, compile_grammar: Compile) -> list[Tool]:
    """Return the tools; those that are not strict and whose schema can't be enforced take any object."""
    enforced = []
    for tool in tools:
        try:
            budget.take(tool.parameters or {}, param=tool.param)
            compile_grammar(f"start: {json_rule(_arguments_schema(tool), param=tool.param)}", tool.param)
            enforced.append(tool)
        except InvalidValueError:
            if tool.is_strict:
                raise
            enforced.append(replace(tool, parameters=None))
    return enforced


def _arguments_schema(tool: Tool) -> dict[str, Any]:
    """Return what the arguments of a call of a tool must be: an object, whatever else the tool says."""
    return {"type": "object"} | (tool.parameters or {})


def _call_rules(syntax: CallSyntax, *, tools: Sequence[Tool], tokenizer: Tokenizer, is_parallel: bool) -> str:
    """Write the grammar's rules of calls.

    Raises:
        InvalidValueError: when there is no tool, or the parameters of one are nested too deeply.
    """

    def literal(text: str) -> str:
        return _literal(text, tokenizer)

    if not tools:
        raise InvalidValueError("There is no tool to call.", param="tools")
    several = f"({literal(syntax.between)} call)*" if is_parallel and syntax.between is not None else ""
    opening, closing = (literal("["), literal("]")) if syntax.is_list else ("", "")
    begin, end = literal(syntax.begin), literal(syntax.end)
    lines = [
        f"calls: {begin} {opening} call {several} {closing} {end}",
        "call: " + " | ".join(f"call_{i}" for i in range(len(tools))),
    ]
    for i, tool in enumerate(tools):
        before = literal(syntax.head + tool.name + syntax.middle)
        lines.append(f'call_{i}: {before} arguments_{i} "}}"')
        lines.append(f"arguments_{i}: {json_rule(_arguments_schema(tool), param=tool.param)}")
    return "\n".join(lines)


def _literal(text: str, tokenizer: Tokenizer) -> str:
    """Return a text as a grammar writes it: marks by their token's id, all else quoted."""
    marks = {
        str(added.content): token_id
        for token_id, added in tokenizer.pipeline.get_added_tokens_decoder().items()
        if added.special
    }
    pattern = "|".join(re.escape(mark) for mark in sorted(marks, key=len, reverse=True))
    parts = re.split(f"({pattern})", text) if pattern else [text]
    written = (
        f"<[{marks[part]}]>" if part in marks else json.dumps(part, ensure_ascii=False)
        for part in parts
        if part
    )
    return " ".join(written)
