"""From what pydantic finds in a field to the one error of OpenAI's shape that names it."""

import difflib
from collections.abc import Iterable

from luthier.core.errors import (
    InvalidRequestError,
    InvalidTypeError,
    InvalidValueError,
    MissingParameterError,
    UnknownParameterError,
)

_LIKENESS = 0.7
# No longer than a field's name is: comparing a million characters takes seconds.
_MAX_CHARACTERS = 80
_MAX_SHOWN_CHARACTERS = 40


def field_error(
    kind: str, param: str | None, message: str, *, advice: str = "Leave it out."
) -> InvalidRequestError:
    """Return the error of a finding.

    Args:
        kind: the finding's `type`, such as `missing` or `string_type`.
        param: the field's dotted path.
        message: what is wrong with the value, where there is one.
        advice: what to do about a field that there is not.
    """
    if kind == "missing":
        return MissingParameterError(f"Missing required parameter: '{param}'.", param=param)
    if kind == "extra_forbidden":
        return UnknownParameterError(f"Unknown parameter: '{param}'. {advice}", param=param)
    is_type = kind.endswith(("_type", "_parsing"))
    return (InvalidTypeError if is_type else InvalidValueError)(message, param=param)


def nearest_name(name: str, known: Iterable[str]) -> str | None:
    """Return the name that is most like an unknown one, or None when none is like it."""
    near = difflib.get_close_matches(name[:_MAX_CHARACTERS], list(known), n=1, cutoff=_LIKENESS)
    return near[0] if near else None


def advise(name: str, known: Iterable[str]) -> str:
    """Say what to do about an unknown field, by the names that there are."""
    near = nearest_name(name, known)
    return f"Did you mean '{near}'?" if near else "Leave it out."


def shown_part(part: str | int) -> str:
    """Return a part of a field's path as errors show it: escaped, and cut."""
    return str(part).encode("unicode_escape").decode()[:_MAX_SHOWN_CHARACTERS]
