"""Options of a job as the body of a request."""

import json
from typing import Any

from luthier.core.errors import InvalidValueError

# What `method.type` says on the wire; every other word is a `tuning.type`.
_OBJECTIVES = {"supervised", "dpo"}


def job_body(
    model: str,
    *,
    method: str | None,
    tuning: str | None,
    training: str | None,
    hyperparameters: str | None,
) -> dict[str, Any]:
    """Return the body of a create or an estimate, its files still to be named.

    Args:
        method: a way to tune, an objective, or a JSON object.

    Raises:
        InvalidValueError: when an option is no JSON object, or `method` and `tuning` name two ways to tune.
    """
    body: dict[str, Any] = {"model": model}
    texts = {"tuning": tuning, "training": training, "hyperparameters": hyperparameters}
    body |= {name: _read_object(name, text) for name, text in texts.items() if text is not None}
    if method is None:
        return body
    if method.lstrip().startswith("{"):
        return body | {"method": _read_object("method", method)}
    if method in _OBJECTIVES:
        return body | {"method": {"type": method}}
    named = body.get("tuning", {}).get("type", method)
    if named != method:
        raise InvalidValueError(f"--method says {method}, --tuning says {named}. Name one.", param="method")
    return body | {"tuning": {**body.get("tuning", {}), "type": method}}


def _read_object(option: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InvalidValueError(f"--{option} is no JSON: {error}", param=option) from error
    if not isinstance(value, dict):
        raise InvalidValueError(
            f'--{option} must be a JSON object, such as {{"type": "lora"}}.', param=option
        )
    return value
