"""OpenAI's preferences: `{"input": {"messages", "tools"?, "parallel_tool_calls"?}, "preferred_output": [...],
"non_preferred_output": [...]}`. The older names of the outputs, `preferred_completion` and
`non_preferred_completion`, are taken too.

Only the messages of the outputs are learnt, never those of the input. For jobs of method dpo.
"""

from typing import Any

from luthier.data.formats._messages import check_answers, check_each, to_turns
from luthier.data.formats._tools import MAX_BROKEN, check_definitions, to_definitions
from luthier.data.formats.base import Broken, Row, RowFormat, check_keys, check_type, escape_text

_INPUT_KEYS = ("messages", "tools", "parallel_tool_calls")
_OUTPUTS = ("preferred_output", "non_preferred_output")
_ALIASES = {"preferred_completion": "preferred_output", "non_preferred_completion": "non_preferred_output"}


class PreferenceFormat(RowFormat):
    name = "preference"
    signature = frozenset({"input", *_OUTPUTS})
    keys = frozenset({"input", *_OUTPUTS, *_ALIASES})
    json_keys = keys

    def make_row(self, row: dict[str, Any]) -> Row:
        row = _with_newer_names(row)
        prompt = to_turns(row["input"]["messages"], is_trained=False)
        preferred, rejected = (to_turns(row[output]) for output in _OUTPUTS)
        return Row([*prompt, *preferred], to_definitions(row["input"]), [*prompt, *rejected])

    def check(self, row: dict[str, Any]) -> list[Broken]:
        known = ", ".join(["input", *_OUTPUTS])
        broken: list[Broken] = []
        for key in row:
            if key not in self.keys:
                advice = f"Unknown key; a preference has {known}."
                broken.append((escape_text(key), "row.unknown_key", advice))
            elif key in _ALIASES and _ALIASES[key] in row:
                advice = f'"{key}" is the older name of "{_ALIASES[key]}": a row has one of them.'
                broken.append((key, "row.twice", advice))
        row = _with_newer_names(row)
        messages, is_parallel_allowed, found = _check_input(row.get("input"))
        broken += found
        for output in _OUTPUTS:
            broken += _check_output(row.get(output), output, is_parallel_allowed=is_parallel_allowed)
        if broken or messages is None:
            return broken
        broken += _check_joined(messages, row)
        if not broken and row[_OUTPUTS[0]] == row[_OUTPUTS[1]]:
            broken.append((_OUTPUTS[1], "preference.equal", "The two outputs are equal: none is preferred."))
        return broken


def _with_newer_names(row: dict[str, Any]) -> dict[str, Any]:
    return {_ALIASES.get(key, key): value for key, value in row.items()}


def _check_input(given: Any) -> tuple[list[Any] | None, bool, list[Broken]]:
    """Return the messages of an input, whether one message may call two tools, and broken rules."""
    if not isinstance(given, dict):
        advice = '"input" must be an object with messages, perhaps tools and parallel_tool_calls.'
        return None, True, [("input", "input.type", advice)]
    advice = f"an input has {', '.join(_INPUT_KEYS)}."
    broken = check_keys(given, _INPUT_KEYS, "input.", "input.unknown_key", advice)
    broken += check_definitions(given, "input.")
    key = "parallel_tool_calls"
    broken += check_type(given, key, bool, "input.", f"row.{key}", "true or false")
    messages, is_parallel_allowed = given.get("messages"), given.get(key) is not False
    if not isinstance(messages, list) or not messages:
        advice = '"messages" must be a list with at least one message.'
        return None, is_parallel_allowed, [*broken, ("input.messages", "messages.type", advice)]
    found = check_each(messages, "input.messages", is_parallel_allowed=is_parallel_allowed)
    if not found and messages[-1]["role"] == "assistant":
        advice = "The input ends with what is answered: its last message can't be the assistant's."
        found = [(f"input.messages[{len(messages) - 1}].role", "messages.last", advice)]
    return messages, is_parallel_allowed, broken + found


def _check_output(given: Any, path: str, *, is_parallel_allowed: bool) -> list[Broken]:
    if not isinstance(given, list) or not given:
        advice = f'"{path}" must be a list with at least one message of the assistant.'
        return [(path, "output.type", advice)]
    broken: list[Broken] = []
    for place, message in enumerate(given):
        if len(broken) >= MAX_BROKEN:
            break
        role = message.get("role") if isinstance(message, dict) else None
        if isinstance(role, str) and role not in ("assistant", "tool"):
            advice = "An output holds messages of the assistant and of tools alone."
            broken.append((f"{path}[{place}].role", "output.role", advice))
    if broken:
        return broken
    broken += check_each(given, path, is_parallel_allowed=is_parallel_allowed)
    if not broken and given[-1]["role"] != "assistant":
        advice = "The last message of an output must be the assistant's."
        broken.append((f"{path}[{len(given) - 1}].role", "messages.last", advice))
    return broken


def _check_joined(messages: list[Any], row: dict[str, Any]) -> list[Broken]:
    """Check the order of calls and answers over the input and each output."""
    # A fault within the input is found with each output; an object keeps the order of its keys.
    broken: dict[Broken, None] = {}
    num_input = len(messages)
    for output in _OUTPUTS:
        for field, rule, advice in check_answers([*messages, *row[output]], ""):
            # The paths are those of one joined list, such as [3].tool_call_id.
            number, rest = field[1:].split("]", 1)
            place = int(number)
            where = f"input.messages[{place}]" if place < num_input else f"{output}[{place - num_input}]"
            broken[where + rest, rule, advice] = None
    return list(broken)


FORMAT = PreferenceFormat()
