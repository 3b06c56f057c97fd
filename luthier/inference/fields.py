"""The fields of a request's body before any model looks at them: JSON, null, texts, what is ignored.

Shared by all endpoints; knows none of their fields.
"""

import difflib
import json
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from luthier.core.errors import (
    InvalidRequestError,
    InvalidTypeError,
    InvalidValueError,
    LuthierError,
    MissingParameterError,
    UnknownParameterError,
    UnsupportedValueError,
)

# Sent unasked by SDKs and frameworks; they change nothing about a text answer here.
IGNORED_FIELDS = frozenset(
    {
        "user",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "service_tier",
        "store",
        "metadata",
        "reasoning_effort",
        "verbosity",
        "moderation",
    }
)

# How alike a field must be to one that there is, and how many letters of it are compared.
_LIKENESS, _MAX_LETTERS = 0.7, 80

ModelT = TypeVar("ModelT", bound=BaseModel)


def read_object(body: bytes) -> dict[str, Any]:
    """Read a body's JSON object.

    Args:
        body: as the client sent it.

    Returns:
        Its fields without those that are null, which means "unset" on this wire.

    Raises:
        InvalidRequestError: when it is no JSON object, or holds text that no tokenizer can take.
    """
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError("The body is not valid JSON.") from error
    if not isinstance(content, dict):
        raise InvalidRequestError("The body must be a JSON object.")
    fields = without_nulls(content)
    _refuse_unreadable_text(fields)
    return fields


def without_nulls(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that are not null."""
    return {name: value for name, value in fields.items() if value is not None}


def drop_ignored(fields: dict[str, Any], names: frozenset[str]) -> None:
    """Take away what is accepted and has no effect."""
    for name in names & fields.keys():
        del fields[name]


def drop_neutral(fields: dict[str, Any], neutral: dict[str, tuple[Any, ...]], prefix: str = "") -> None:
    """Take away fields that say "not used".

    Args:
        neutral: of each such field the values that mean so.
        prefix: of the fields' names, such as `messages.0.`.

    Raises:
        UnsupportedValueError: for any other value.
    """
    for name, allowed in neutral.items():
        if name not in fields:
            continue
        value = fields.pop(name)
        if not any(value == item and (type(value) is bool) == (type(item) is bool) for item in allowed):
            raise UnsupportedValueError(
                f"This value of {prefix}{name} is not supported by this server; leave the field out.",
                param=prefix + name,
            )


def _refuse_unreadable_text(fields: dict[str, Any]) -> None:
    """Refuse texts that JSON can spell and no tokenizer can take, as training does with its rows.

    It walks with a list of its own: JSON as deep as the parser allows must not exhaust Python's stack.
    """
    remaining: list[tuple[str, Any]] = [("", fields)]
    while remaining:
        param, value = remaining.pop()
        if isinstance(value, str):
            _refuse_unreadable(value, param)
        elif isinstance(value, list):
            remaining.extend((f"{param}.{i}", item) for i, item in enumerate(value))
        elif isinstance(value, dict):
            for name in value:
                # An unreadable name can't be told either; its place is the object that holds it.
                _refuse_unreadable(name, param or None)
            remaining.extend((f"{param}.{name}" if param else name, item) for name, item in value.items())


def _refuse_unreadable(text: str, param: str | None) -> None:
    if "\x00" in text:
        raise InvalidValueError("The text holds a NUL character; remove it.", param=param)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidValueError(
            "The text holds an escape of half a character (a lone surrogate); write the whole pair.",
            param=param,
        ) from None


def validate(model: type[ModelT], fields: Any, prefix: str = "") -> ModelT:
    """Check fields by a model.

    Args:
        fields: as the client sent them, nulls gone.
        prefix: of the fields' names, such as `tools.0.`.

    Raises:
        InvalidRequestError: naming the first field that breaks a rule.
    """
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise _to_request_error(error, model, prefix) from error


def _to_request_error(error: ValidationError, model: type[BaseModel], prefix: str) -> LuthierError:
    first = error.errors(include_input=False, include_url=False)[0]
    # A union adds the name of its member to the place; clients know field names and positions only.
    place = [str(part) for part in first["loc"] if isinstance(part, int) or str(part).isidentifier()]
    if len(place) > 1 and place[0] == "prompt":
        place = [part for part in place if part not in {"str", "list"}]
    param = (prefix + ".".join(place)).removesuffix(".")
    kind = first["type"]
    if kind == "missing":
        return MissingParameterError(f"Missing required parameter: {param[:120]!r}.", param=param)
    if kind == "extra_forbidden":
        advice = _advise(place[0], model) if len(place) == 1 else "Leave it out."
        return UnknownParameterError(f"Unknown parameter: {param[:80]!r}. {advice}", param=param[:80])
    message = f"{param[:120]}: {_explain(first)}."
    if kind.endswith("_type") or kind.endswith("_parsing"):
        return InvalidTypeError(message, param=param)
    return InvalidValueError(message, param=param)


def _advise(name: str, model: type[BaseModel]) -> str:
    near = difflib.get_close_matches(name[:_MAX_LETTERS], model.model_fields, n=1, cutoff=_LIKENESS)
    return f"Did you mean {near[0]!r}?" if near else "Leave it out."


def _explain(found: ErrorDetails) -> str:
    """Return what is wrong, of lists in a client's words: what the service calls a tuple is one in JSON."""
    context = found.get("ctx", {})
    if found["type"] == "too_long":
        return f"send at most {context['max_length']} entries"
    if found["type"] == "too_short":
        return f"send at least {context['min_length']} of them"
    return found["msg"]
