"""The fields of a request's body before any model looks at them: JSON, null, texts, what is ignored.

Shared by all endpoints; knows none of their fields.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from luthier.core.errors import (
    InvalidRequestError,
    InvalidValueError,
    LuthierError,
    UnsupportedValueError,
    advise,
    field_error,
)
from luthier.data.json_values import MAX_VALUES, max_num_values

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

_MAX_DEPTH = 64
_MAX_NAMES = 4096
_MAX_NAME_CHARS = 1000
_MAX_PARAM_CHARS = 200

ModelT = TypeVar("ModelT", bound=BaseModel)


def read_object(body: bytes, ignored: frozenset[str] = frozenset()) -> dict[str, Any]:
    """Read a body's JSON object, in memory that is linear in the body's bytes.

    Args:
        ignored: fields that are dropped unread.

    Returns:
        Its fields without those that are null, which means "unset" on this wire.

    Raises:
        InvalidRequestError: when it is no JSON object, has too many or too deeply nested values, or has text
            that no tokenizer can take.
    """
    # A shorter body has fewer.
    if len(body) > MAX_VALUES and max_num_values(body) > MAX_VALUES:
        raise InvalidRequestError(
            f"The body has more than {MAX_VALUES} JSON values; send several requests with less in each."
        )
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError("The body is not valid JSON.") from error
    if not isinstance(content, dict):
        raise InvalidRequestError("The body must be a JSON object.")
    fields = without_nulls(content)
    drop_ignored(fields, ignored)
    _check_names_and_texts(fields, [])
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


def _check_names_and_texts(value: list[Any] | dict[str, Any], path: list[str | int]) -> None:
    """Refuse what is nested too deeply, names too long or too many, and texts that no tokenizer can take.

    Paths are joined for a refusal alone.
    """
    for name, item in _entries(value, path):
        if isinstance(name, str):
            # An unreadable name can't be shown either; its place is the object that holds it.
            _check_name(name, path)
        if isinstance(item, str):
            _refuse_unreadable(item, [*path, name])
        elif isinstance(item, list | dict):
            path.append(name)
            _check_names_and_texts(item, path)
            path.pop()


def _entries(value: list[Any] | dict[str, Any], path: Sequence[str | int]) -> Iterator[tuple[str | int, Any]]:
    if len(path) >= _MAX_DEPTH:
        raise InvalidValueError(f"The value is nested more than {_MAX_DEPTH} deep.", param=_to_param(path))
    if isinstance(value, list):
        return iter(enumerate(value))
    if len(value) > _MAX_NAMES:
        raise InvalidValueError(f"An object may have {_MAX_NAMES} names at most.", param=_to_param(path))
    return iter(value.items())


def _check_name(name: str, path: Sequence[str | int]) -> None:
    if len(name) > _MAX_NAME_CHARS:
        raise InvalidValueError(
            f"A name may have {_MAX_NAME_CHARS} characters at most.", param=_to_param(path)
        )
    _refuse_unreadable(name, path)


def _to_param(path: Sequence[str | int]) -> str | None:
    return ".".join(str(part) for part in path)[:_MAX_PARAM_CHARS] or None


def _refuse_unreadable(text: str, path: Sequence[str | int]) -> None:
    if "\x00" in text:
        raise InvalidValueError("The text holds a NUL character; remove it.", param=_to_param(path))
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidValueError(
            "The text holds an escape of half a character (a lone surrogate); write the whole pair.",
            param=_to_param(path),
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
    param = (prefix + ".".join(place)).removesuffix(".")[:_MAX_PARAM_CHARS]
    kind = first["type"]
    if kind == "extra_forbidden":
        advice = advise(place[0], model.model_fields) if len(place) == 1 else "Leave it out."
        return field_error(kind, param[:80], "", advice=advice)
    return field_error(kind, param, f"{param[:120]}: {_explain(first)}.")


def _explain(found: ErrorDetails) -> str:
    """Return what is wrong, of lists in a client's words: what the service calls a tuple is one in JSON."""
    context = found.get("ctx", {})
    if found["type"] == "too_long":
        return f"send at most {context['max_length']} entries"
    if found["type"] == "too_short":
        return f"send at least {context['min_length']} of them"
    return found["msg"]


def load(text: str | None) -> Any:
    """Return the value of a JSON text, None for what is none."""
    try:
        return None if text is None else json.loads(text)
    except (ValueError, RecursionError):
        return None
