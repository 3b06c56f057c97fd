"""OpenAI's messages: every rule of one message, and the rules between them."""

import itertools
from typing import Any

from luthier.data.formats._tools import MAX_BROKEN, check_called, check_calls, to_call
from luthier.data.formats.base import Broken, Turn, check_type, describe_choice, escape_text

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
# Which role's messages may have a key; every message has role and content, and may have a name.
_OWNERS = {
    "weight": "assistant",
    "tool_calls": "assistant",
    "function_call": "assistant",
    "refusal": "assistant",
    "reasoning_content": "assistant",
    "tool_call_id": "tool",
}
_PLAIN_KEYS = ("role", "content", "name")
# Answers that were dumped from an SDK have these, null; with a value they can't be trained on.
_UNSUPPORTED_KEYS = ("audio", "refusal", "annotations")
_UNSUPPORTED_PARTS = {
    "image_url": "Images are not supported",
    "image": "Images are not supported",
    "input_image": "Images are not supported",
    "input_audio": "Audio is not supported",
    "file": "Files are not supported",
    "refusal": "Refusal parts are not supported",
}


def check_each(messages: list[Any], path: str, *, is_parallel_allowed: bool) -> list[Broken]:
    """Check messages one by one; `is_parallel_allowed`: one message may call two tools."""
    broken: list[Broken] = []
    for place, message in enumerate(messages):
        if len(broken) >= MAX_BROKEN:
            break
        here = f"{path}[{place}]"
        found = _check_message(message, here)
        if not found and not is_parallel_allowed and len(message.get("tool_calls") or ()) > 1:
            advice = '"parallel_tool_calls" is false, and this message calls two tools: part it.'
            found = [(f"{here}.tool_calls", "tool_calls.parallel", advice)]
        broken += found
    return broken


def _check_message(message: Any, path: str) -> list[Broken]:
    if not isinstance(message, dict):
        return [(path, "message.type", "A message must be an object with role and content.")]
    broken: list[Broken] = []
    for key, value in message.items():
        if key in _UNSUPPORTED_KEYS:
            if value is not None:
                advice = f'"{key}" is not supported: leave it out, or write it as content.'
                broken.append((f"{path}.{key}", "message.unsupported", advice))
        elif key not in _PLAIN_KEYS and key not in _OWNERS:
            advice = f"Unknown key; a message has {', '.join([*_PLAIN_KEYS, *_OWNERS])}."
            broken.append((f"{path}.{escape_text(key)}", "message.unknown_key", advice))
    role = message.get("role")
    is_role = isinstance(role, str) and role in ROLES
    if not is_role:
        broken.append((f"{path}.role", "message.role", describe_choice(message, "role", ROLES)))
    if not (broken and "content" not in message):
        broken += _check_content(message, path)
    broken += check_type(message, "name", str, f"{path}.", "message.name", "a string")
    return broken + (_check_owned(message, path) if is_role else [])


def _check_owned(message: dict[str, Any], path: str) -> list[Broken]:
    """Check what only the messages of one role have."""
    broken: list[Broken] = []
    role = message["role"]
    for key, owner in _OWNERS.items():
        # A weight is a number even where it says nothing.
        if message.get(key) is None and not (key == "weight" and key in message):
            continue
        if role != owner:
            rule = "message.weight" if key == "weight" else "message.misplaced"
            broken.append((f"{path}.{key}", rule, f'Only {owner} messages have "{key}"; remove it.'))
    if broken:
        return broken
    weight = message.get("weight", 1)
    if isinstance(weight, bool) or not isinstance(weight, int) or weight not in (0, 1):
        broken.append((f"{path}.weight", "message.weight", "The weight must be the integer 0 or 1."))
    if message.get("tool_calls") is not None:
        broken += check_calls(message["tool_calls"], f"{path}.tool_calls")
    if message.get("function_call") is not None:
        broken += check_called(message["function_call"], f"{path}.function_call")
    if message.get("tool_calls") is not None and message.get("function_call") is not None:
        advice = '"function_call" is the older spelling of "tool_calls": a message has one of them.'
        broken.append((f"{path}.function_call", "tool_calls.twice", advice))
    broken += check_type(
        message, "reasoning_content", str, f"{path}.", "message.reasoning_content", "a string"
    )
    id_ = message.get("tool_call_id")
    if role == "tool" and (not isinstance(id_, str) or not id_):
        advice = "A tool's message names the id of the call that it answers, a string."
        broken.append((f"{path}.tool_call_id", "message.tool_call_id", advice))
    if role == "function" and not isinstance(message.get("name"), str):
        broken.append((f"{path}.name", "message.name", "A function's message must have the function's name."))
    return broken


def _check_content(message: dict[str, Any], path: str) -> list[Broken]:
    content = message.get("content")
    has_calls = message.get("tool_calls") is not None or message.get("function_call") is not None
    if content is None and has_calls and message.get("role") == "assistant":
        return []
    if "content" not in message:
        return [(f"{path}.content", "message.content", '"content" is missing; it must be a string.')]
    if isinstance(content, str):
        return []
    if not isinstance(content, list) or not content:
        advice = '"content" must be a string.'
        if content is None:
            advice += " Only an assistant message with tool calls may do without."
        return [(f"{path}.content", "message.content", advice)]
    return _check_parts(content, path)


def _check_parts(parts: list[Any], path: str) -> list[Broken]:
    for place, part in enumerate(parts):
        part_path = f"{path}.content[{place}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind in _UNSUPPORTED_PARTS:
            advice = f'{_UNSUPPORTED_PARTS[kind]} ("{kind}"): text only. Remove the part or the row.'
            return [(f"{part_path}.type", "content.unsupported", advice)]
        if kind != "text" or not isinstance(part.get("text"), str) or len(part) != 2:
            return [(part_path, "content.part", 'A part must be {"type": "text", "text": "..."}.')]
    return []


def check_answers(messages: list[dict[str, Any]], path: str) -> list[Broken]:
    """Check that every call is answered before the assistant speaks again; at the end it may stand open.

    A call of the older kind has no id: its function's name stands for it.
    """
    broken: list[Broken] = []
    open_calls: dict[tuple[str, str], str] = {}
    for place, message in enumerate(messages):
        if len(broken) >= MAX_BROKEN:
            break
        here = f"{path}[{place}]"
        role = message["role"]
        if role == "assistant":
            for field in itertools.islice(open_calls.values(), MAX_BROKEN):
                advice = (
                    "This call is not answered before the assistant's next message: add the tool's answer."
                )
                broken.append((field, "tool_call.unanswered", advice))
            open_calls.clear()
            for number, call in enumerate(message.get("tool_calls") or ()):
                field = f"{here}.tool_calls[{number}].id"
                if ("tool", call["id"]) in open_calls and len(broken) < MAX_BROKEN:
                    broken.append((field, "tool_call.id_twice", "Two calls of one message have this id."))
                open_calls["tool", call["id"]] = field
            if message.get("function_call") is not None:
                open_calls["function", message["function_call"]["name"]] = f"{here}.function_call"
        elif role in ("tool", "function"):
            key = "tool_call_id" if role == "tool" else "name"
            if open_calls.pop((role, message[key]), None) is None:
                advice = (
                    "It answers no open call of the assistant message before it: correct it or remove it."
                )
                broken.append((f"{here}.{key}", "tool.no_call", advice))
    return broken


def to_turns(messages: list[dict[str, Any]], *, is_trained: bool = True) -> list[Turn]:
    """Return checked messages as turns.

    Calls of the older kind become tool calls with an id made from their place, their answers a tool's turn:
    chat templates know no others.

    `is_trained`: assistant messages are trained unless their weight is 0.
    """
    turns: list[Turn] = []
    call_id = ""
    for place, message in enumerate(messages):
        role, content = message["role"], message.get("content")
        calls = tuple(to_call(call["id"], call["function"]) for call in message.get("tool_calls") or ())
        if message.get("function_call") is not None:
            call_id = f"call_{place}"
            calls = (to_call(call_id, message["function_call"]),)
        turns.append(
            Turn(
                role="tool" if role == "function" else role,
                content="".join(part["text"] for part in content) if isinstance(content, list) else content,
                name=message.get("name"),
                is_trained=is_trained and role == "assistant" and message.get("weight") != 0,
                tool_calls=calls,
                tool_call_id=call_id if role == "function" else message.get("tool_call_id"),
                reasoning=message.get("reasoning_content"),
            )
        )
    return turns
