"""Lists as OpenAI's clients page through them."""

from collections.abc import Sequence
from typing import Any


def list_object(data: Sequence[dict[str, Any]], *, has_more: bool, with_ids: bool = False) -> dict[str, Any]:
    """Return a page; `has_more` is always there, since a client that misses it asks for ever."""
    body: dict[str, Any] = {"object": "list", "data": list(data), "has_more": has_more}
    if with_ids:
        body["first_id"] = data[0]["id"] if data else None
        body["last_id"] = data[-1]["id"] if data else None
    return body
