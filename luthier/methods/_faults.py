"""From what pydantic finds in a `tuning` object to the one error that names its field, for every method."""

from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from luthier.core.errors import InvalidRequestError, advise, field_error, shown_part

_Path = tuple[str | int, ...]
_MAX_CHARACTERS = 40


def first_fault(error: ValidationError, tuning: dict[str, Any], known: Sequence[str]) -> InvalidRequestError:
    """Return the error for the first field with a fault.

    Where a field takes this or that (a name or a list of names), pydantic tells a fault of each branch; the
    one that reaches deepest into what was sent is the one that was meant.

    Args:
        tuning: the object as it came.

    Returns:
        The error; its `param` is the field's path, such as `tuning.target_modules.1`.
    """
    faults = [(_path(fault["loc"], fault["type"], tuning), fault) for fault in error.errors()]
    field = faults[0][0][:1]
    path = max((path for path, _ in faults if path[:1] == field), key=len)
    of_path = [fault for found, fault in faults if found == path]
    param = ".".join(["tuning", *(shown_part(part) for part in path)])
    kinds = {str(fault["type"]) for fault in of_path}
    for kind in ("extra_forbidden", "missing"):
        if kind in kinds:
            return field_error(kind, param, "", advice=_advice(path, known))
    value = _value_at(path, tuning)
    rules = sorted({str(fault["msg"]).removeprefix("Value error, ") for fault in of_path})
    shown = repr(value)[:_MAX_CHARACTERS]
    message = f"Invalid value for '{param}': {shown}. {'; or: '.join(rules)}."
    # A number out of its range breaks a bound; the other branch of the union ("auto") is then no type fault.
    is_out_of_range = any(not kind.endswith(("_type", "_parsing", "literal_error")) for kind in kinds)
    is_value = is_out_of_range or isinstance(value, str)
    return field_error("value_error" if is_value else "value_type", param, message)


def _advice(path: _Path, known: Sequence[str]) -> str:
    if len(path) > 1:
        return "Leave it out."
    return f"{advise(str(path[0]), known)} This type of tuning takes: {', '.join(known)}."


def _path(location: Sequence[str | int], kind: str, tuning: dict[str, Any]) -> _Path:
    """Return where a fault lies in what was sent; pydantic's names of a union's branches are left out."""
    path: list[str | int] = []
    value: Any = tuning
    for place, part in enumerate(location):
        is_absent_field = place == len(location) - 1 and kind == "missing"
        if is_absent_field or _has(value, part) or not path:
            path.append(part)
            value = value[part] if _has(value, part) else None
    return tuple(path)


def _has(value: Any, part: str | int) -> bool:
    if isinstance(value, dict):
        return part in value
    return isinstance(value, list) and isinstance(part, int) and part < len(value)


def _value_at(path: _Path, tuning: dict[str, Any]) -> Any:
    value: Any = tuning
    for part in path:
        value = value[part] if _has(value, part) else None
    return value
