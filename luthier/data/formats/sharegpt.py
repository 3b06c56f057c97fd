"""ShareGPT's rows: `{"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}`.

Speakers: system; human or user; gpt, assistant, model or chatgpt; function_call or tool_call, whose value is
a JSON object (or a list of them) of `name` and `arguments`; tool, observation or function_response, which
answer it. A row may have `id`, which is not used, a `system` text, and `tools`: OpenAI's definitions, or the
functions alone, as a list or as its JSON text. Every turn of the assistant is learnt.
"""

import itertools
import json
from typing import Any

from luthier.data.formats._tools import MAX_BROKEN, check_definitions, check_name
from luthier.data.formats.base import (
    Broken,
    Row,
    RowFormat,
    ToolCall,
    Turn,
    check_keys,
    check_type,
    describe_choice,
)

_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "function_call": "call",
    "tool_call": "call",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
_KEYS = ("conversations", "id", "system", "tools")


class ShareGptFormat(RowFormat):
    """Rows of `conversations` whose last turn is the assistant's."""

    name = "sharegpt"
    signature = frozenset({"conversations"})
    keys = frozenset(_KEYS)
    json_keys = frozenset({"conversations", "tools"})

    def check(self, row: dict[str, Any]) -> list[Broken]:
        broken = check_keys(row, _KEYS, "", "row.unknown_key", f"a ShareGPT row has {', '.join(_KEYS)}.")
        broken += check_type(row, "system", str, "", "field.type", "a string")
        tools = _parse_tools(row.get("tools"))
        if tools == "":
            broken.append(("tools", "tools.type", 'The text of "tools" is no JSON list.'))
        else:
            broken += check_definitions({"tools": tools})
        turns = row.get("conversations")
        if not isinstance(turns, list) or not turns:
            what = "is missing" if "conversations" not in row else "must be a list with at least one turn"
            return [*broken, ("conversations", "messages.type", f'"conversations" {what}.')]
        for place, turn in enumerate(turns):
            if len(broken) >= MAX_BROKEN:
                break
            broken += _check_turn(turn, f"conversations[{place}]")
        if broken:
            return broken
        return _check_order(row, [_ROLES[turn["from"]] for turn in turns])

    def make_row(self, row: dict[str, Any]) -> Row:
        turns: list[Turn] = []
        if row.get("system"):
            turns.append(Turn("system", row["system"], None, False))
        open_ids: list[str] = []
        for place, given in enumerate(row["conversations"]):
            role, text = _ROLES[given["from"]], given["value"]
            if role == "call":
                calls = tuple(
                    ToolCall(f"call_{place}_{number}", call["name"], call["arguments"])
                    for number, call in enumerate(_parse_calls(text) or ())
                )
                open_ids = [call.id for call in calls]
                turns.append(Turn("assistant", None, None, True, tool_calls=calls))
            elif role == "tool":
                call_id = open_ids.pop(0) if open_ids else None
                turns.append(Turn("tool", text, None, False, tool_call_id=call_id))
            else:
                turns.append(Turn(role, text, None, role == "assistant"))
        return Row(turns, _parse_tools(row.get("tools")) or None)


def _check_turn(turn: Any, path: str) -> list[Broken]:
    if not isinstance(turn, dict):
        return [(path, "message.type", "A turn must be an object with from and value.")]
    advice = "a turn has from and value."
    broken = check_keys(turn, ("from", "value"), f"{path}.", "message.unknown_key", advice)
    speaker = turn.get("from")
    if not isinstance(speaker, str) or speaker not in _ROLES:
        return [*broken, (f"{path}.from", "message.role", describe_choice(turn, "from", _ROLES))]
    if not isinstance(turn.get("value"), str):
        return [*broken, (f"{path}.value", "message.content", '"value" must be a string.')]
    if _ROLES[speaker] == "call" and not broken:
        broken += _check_call(turn["value"], f"{path}.value")
    return broken


def _check_call(text: str, path: str) -> list[Broken]:
    calls = _parse_calls(text)
    if calls is None:
        advice = 'A call must be the JSON text {"name": "...", "arguments": {...}}, or a list of such.'
        return [(path, "tool_call.arguments", advice)]
    faults = (fault for call in calls for fault in check_name(call.get("name"), path))
    return list(itertools.islice(faults, MAX_BROKEN))


def _check_order(row: dict[str, Any], roles: list[str]) -> list[Broken]:
    last = f"conversations[{len(roles) - 1}].from"
    broken: list[Broken] = []
    if row.get("system") is not None and roles[0] == "system":
        advice = '"system" and a turn of the system: leave one of them out.'
        broken.append(("system", "messages.system_twice", advice))
    for place, role in enumerate(roles):
        if len(broken) >= MAX_BROKEN:
            break
        if role == "tool" and (place == 0 or roles[place - 1] not in ("call", "assistant", "tool")):
            advice = "A tool answers the assistant: it follows a call, the assistant or another answer."
            broken.append((f"conversations[{place}].from", "tool.no_call", advice))
    if not {"assistant", "call"} & set(roles):
        advice = "The row has no turn of the assistant to learn from; add one."
        broken.append((last, "messages.no_assistant", advice))
    elif roles[-1] not in ("assistant", "call"):
        advice = "The last turn must be the assistant's; drop what follows it."
        broken.append((last, "messages.last", advice))
    return broken


def _parse_calls(text: str) -> list[dict[str, Any]] | None:
    """Return the calls that a text holds, None when it holds none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    calls = value if isinstance(value, list) else [value]
    is_sound = calls and all(
        isinstance(call, dict)
        and call.keys() == {"name", "arguments"}
        and isinstance(call["arguments"], dict)
        for call in calls
    )
    return calls if is_sound else None


def _parse_tools(tools: Any) -> Any:
    """Return tools in OpenAI's shape, None without any, an empty text where their text is no list."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except (ValueError, RecursionError):
            return ""
    if not isinstance(tools, list):
        return tools
    return [
        {"type": "function", "function": tool} if isinstance(tool, dict) and "function" not in tool else tool
        for tool in tools
    ]


FORMAT = ShareGptFormat()
