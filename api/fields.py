"""Which of the fields that a body has was meant by one that it does not have."""

from collections.abc import Iterator, Sequence
from typing import Any, get_args

from fastapi import Request
from pydantic import BaseModel

from luthier.core.errors import nearest_name


def nearest_field(request: Request, path: Sequence[str]) -> str | None:
    """Find the field whose name is most like an unknown one's; of equals the one beside it.

    Args:
        request: as it was routed.

    Returns:
        The dotted path of a field that there is, or None when no name is like it.
    """
    body = getattr(request.scope.get("route"), "body_field", None)
    known = [] if body is None else list(_paths(body.field_info.annotation))
    near = nearest_name(path[-1], {one[-1] for one in known})
    alike = [one for one in known if one[-1] == near]
    found = min(alike, key=lambda one: one[:-1] != tuple(path[:-1]), default=None)
    return None if found is None else ".".join(found)


def _paths(annotation: Any, before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the path of each field of the objects that a type stands for."""
    for part in (annotation, *get_args(annotation)):
        if isinstance(part, type) and issubclass(part, BaseModel):
            for name, field in part.model_fields.items():
                yield (*before, name)
                yield from _paths(field.annotation, (*before, name))
