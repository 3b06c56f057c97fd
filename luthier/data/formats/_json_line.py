"""A line to a JSON value with everything refused that JSON leaves open."""

import json
import re
from typing import Any, NoReturn

from luthier.data.formats.base import Fault, escape_text
from luthier.data.json_values import MAX_VALUES, max_num_values

_MAX_KEYS = 10_000
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class _RefusedError(ValueError):
    def __init__(self, rule: str, message: str) -> None:
        super().__init__(message)
        self.rule = rule


def _refuse_constant(name: str) -> NoReturn:
    raise _RefusedError("json.constant", f"{name} is not JSON; write a number or null.")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > _MAX_KEYS:
        raise _RefusedError("json.keys", f"An object has more than {_MAX_KEYS} keys; split it.")
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise _RefusedError(
                "json.duplicate_key", f'The key "{escape_text(key)}" appears twice in one object; remove one.'
            )
        content[key] = value
    return content


def _syntax_fault(text: str, number: int, error: json.JSONDecodeError) -> Fault:
    message = f"This is not valid JSON ({error.msg})."
    stripped = text.strip()
    if number == 1 and stripped == "{":
        message += " The file looks like indented JSON: each object must be on one line of its own."
    elif number == 1 and not stripped.startswith(("{", "[")):
        message += (
            " Each line must be one JSON object. Of a CSV file the first line names the columns as a row's "
            "keys are named, such as prompt,completion."
        )
    else:
        message += " Each line must be one JSON object."
    return Fault(number, error.pos + 1, None, "json.syntax", message)


def _decode(line: bytes, number: int) -> str | Fault:
    if (place := line.find(b"\0")) >= 0:
        message = "The line holds a NUL byte; save the file as plain UTF-8 text, not UTF-16 or binary."
        return Fault(number, place + 1, None, "text.nul", message)
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        message = f"Byte {error.start + 1} of the line is not UTF-8; save the file as UTF-8."
        return Fault(number, error.start + 1, None, "text.utf8", message)


def _load(text: str, number: int) -> Any | Fault:
    try:
        value = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique)
        if _SURROGATE.search(text):
            # Python's reader lets lone surrogates through, which no tokenizer can take.
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except json.JSONDecodeError as error:
        return _syntax_fault(text, number, error)
    except _RefusedError as error:
        rule, message = error.rule, str(error)
    except UnicodeEncodeError:
        rule, message = "json.surrogate", "An escape of half a character stands alone; write the whole pair."
    except RecursionError:
        rule, message = "json.depth", "The line is nested too deeply; flatten it."
    except ValueError:
        rule, message = "json.number", "A number has too many digits; shorten it."
    else:
        return value
    return Fault(number, None, None, rule, message)


def parse_line(line: bytes, number: int) -> dict[str, Any] | Fault:
    """Parse line `number` strictly: return its object, or the fault that keeps it from being one."""
    if max_num_values(line) > MAX_VALUES:
        message = f"The line has more than {MAX_VALUES} JSON values; split it."
        return Fault(number, None, None, "json.values", message)
    text = _decode(line, number)
    value = text if isinstance(text, Fault) else _load(text, number)
    if isinstance(value, Fault | dict):
        return value
    message = 'Each line must be a JSON object such as {"messages": [...]}.'
    return Fault(number, None, None, "row.type", message)
