"""The `tuning` object of a job that goes on from a tuned model: what it has from there, what it may set."""

import json
from typing import Any

from luthier.core.errors import InvalidValueError
from luthier.methods._resolve import check_tuning, parse_tuning

_MAX_CHARACTERS = 60


def inherit_tuning(asked: dict[str, Any], parent: dict[str, Any], *, name: str) -> dict[str, Any]:
    """Return the tuning of a job that trains an artifact's weights further.

    Args:
        asked: the request's object as it came; `{}` asks for nothing, "auto" of a shape for the parent's.
        parent: the resolved `tuning` of the job that made the artifact.

    Returns:
        The parent's type and all that shapes its weights or says where they began; the rest as asked for,
        or its default.

    Raises:
        InvalidRequestError: when a member contradicts the parent's, or is wrong in itself; names it.
    """
    method, params = parse_tuning(parent)
    inherited = params.model_dump(mode="json")
    wanted = asked.get("type", method.name)
    if wanted != method.name:
        raise _contradiction("type", wanted, method.name, name)
    for member in _in_order(inherited, method.starting_params):
        if member in asked and asked[member] != inherited[member]:
            raise InvalidValueError(
                f"tuning.{member}: this job starts from the weights of {name}, so there are no first values "
                "to choose; leave it out.",
                param=f"tuning.{member}",
            )
    shapes = _in_order(inherited, method.shaping_params)
    kept = {member: inherited[member] for member in (*shapes, *method.starting_params)}
    sent = {key: value for key, value in asked.items() if key not in shapes or value != "auto"}
    found = check_tuning({"type": method.name, **kept, **sent})
    for member in shapes:
        if found[member] != inherited[member]:
            raise _contradiction(member, found[member], inherited[member], name)
    return found


def _in_order(params: dict[str, Any], members: frozenset[str]) -> list[str]:
    """Return members in the order of the parameters, so that of several faults the same one is told."""
    return [member for member in params if member in members]


def _contradiction(member: str, asked: Any, inherited: Any, name: str) -> InvalidValueError:
    return InvalidValueError(
        f"tuning.{member}: {_shown(asked)} contradicts the {_shown(inherited)} of {name}; leave it out.",
        param=f"tuning.{member}",
    )


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    cut = text if len(text) <= _MAX_CHARACTERS else text[:_MAX_CHARACTERS] + "…"
    return cut.encode("unicode_escape").decode() if not cut.isprintable() else cut
