"""Grammars of answers that call tools: calls alone, calls in place of a formed answer, calls after a text."""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from luthier.core.errors import InvalidValueError
from luthier.data.rendering.tokenizer import Tokenizer
from luthier.inference.openai.grammar import json_rule
from luthier.inference.openai.response_formats import AnswerFormat
from luthier.inference.openai.tool_calls import CallSyntax
from luthier.inference.openai.tools import Tool

_ANY_TEXT = r"/(.|\n)*/"


def arguments_schema(tool: Tool) -> dict[str, Any]:
    """Return what the arguments of a call of a tool must be: an object, whatever else the tool says."""
    return {"type": "object"} | (tool.parameters or {})


def calls_alone(syntax: CallSyntax, tools: Sequence[Tool], tokenizer: Tokenizer, *, is_parallel: bool) -> str:
    """Write the grammar of an answer that is calls and nothing else.

    Args:
        tools: those that may be called, at least one.
        is_parallel: whether there may be several calls.

    Raises:
        InvalidValueError: when the parameters of a tool are nested too deeply.
    """
    return "start: calls\n" + _call_rules(syntax, tools, tokenizer, is_parallel=is_parallel)


def calls_or_answer(
    answer: AnswerFormat,
    syntax: CallSyntax,
    tools: Sequence[Tool],
    tokenizer: Tokenizer,
    *,
    is_parallel: bool,
) -> str:
    """Write the grammar of an answer that is either calls or of a form; the rest is as in `calls_alone`."""
    rules = _call_rules(syntax, tools, tokenizer, is_parallel=is_parallel)
    return f"start: calls | answer\nanswer: {answer.to_rule()}\n{rules}"


def calls_after_text(
    syntax: CallSyntax, tools: Sequence[Tool], tokenizer: Tokenizer, *, is_parallel: bool
) -> str:
    """Write the grammar of an answer whose text is free up to the mark of a call.

    The syntax must have such a mark; the rest is as in `calls_alone`.
    """
    mark = syntax.begin.strip()
    after = syntax.begin[syntax.begin.index(mark) + len(mark) :]
    quoted = _literal(mark, tokenizer)
    # A text up to a mark of letters is one lexeme, found as soon as it ends; a mark of its own stands alone.
    opening = f"opening[lazy]: {_ANY_TEXT} {quoted}" if quoted.startswith('"') else f"opening: TEXT {quoted}"
    rules = _call_rules(replace(syntax, begin=after), tools, tokenizer, is_parallel=is_parallel)
    return f"start: TEXT | opening calls\nTEXT: {_ANY_TEXT}\n{opening}\n{rules}"


def _call_rules(syntax: CallSyntax, tools: Sequence[Tool], tokenizer: Tokenizer, *, is_parallel: bool) -> str:
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
        lines.append(f"arguments_{i}: {json_rule(arguments_schema(tool), param=tool.param)}")
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
