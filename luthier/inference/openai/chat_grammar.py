"""Which grammar a chat's answer is held to: that of its form, of calls of its tools, or none."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from luthier.core.errors import InvalidValueError
from luthier.data.rendering.tokenizer import Tokenizer
from luthier.inference.openai.call_grammar import (
    arguments_schema,
    calls_after_text,
    calls_alone,
    calls_or_answer,
)
from luthier.inference.openai.grammar import CompiledGrammar, json_rule
from luthier.inference.openai.response_formats import AnswerFormat
from luthier.inference.openai.schema_budget import SchemaBudget
from luthier.inference.openai.tool_calls import CallSyntax
from luthier.inference.openai.tools import Tool, Tools

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
        # Alone first, so that a fault of its own is told by its name.
        compile_grammar(f"start: {answer.to_rule()}", answer.param)
    enforced = _enforceable(tools.callable, budget, compile_grammar)
    if must_call:
        lark = calls_alone(syntax, enforced, tokenizer, is_parallel=tools.is_parallel)
    elif answer is not None:
        lark = calls_or_answer(answer, syntax, enforced, tokenizer, is_parallel=tools.is_parallel)
    else:
        lark = calls_after_text(syntax, enforced, tokenizer, is_parallel=tools.is_parallel)
    return compile_grammar(lark, "tools")


def _enforceable(tools: Sequence[Tool], budget: SchemaBudget, compile_grammar: Compile) -> list[Tool]:
    """Return the tools; those that are not strict and whose schema can't be enforced take any object."""
    enforced = []
    for tool in tools:
        try:
            budget.take(tool.parameters or {}, param=tool.param)
            compile_grammar(f"start: {json_rule(arguments_schema(tool), param=tool.param)}", tool.param)
            enforced.append(tool)
        except InvalidValueError:
            if tool.is_strict:
                raise
            enforced.append(replace(tool, parameters=None))
    return enforced
