"""Lists as OpenAI's clients page through them, and the answer to a deletion."""

from collections.abc import Mapping, Sequence
from typing import Any, Generic, Literal, NotRequired, TypeVar, cast

from typing_extensions import TypedDict

ItemT = TypeVar("ItemT")


class ListPage(TypedDict, Generic[ItemT]):
    """A page of a list; `first_id` and `last_id` are there where OpenAI's list has them."""

    object: Literal["list"]
    data: list[ItemT]
    has_more: bool
    first_id: NotRequired[str | None]
    last_id: NotRequired[str | None]


class DeletedObject(TypedDict):
    """What a deletion is answered with."""

    id: str
    object: str
    deleted: Literal[True]
    name: NotRequired[str]


def list_object(data: Sequence[ItemT], *, has_more: bool, with_ids: bool = False) -> ListPage[ItemT]:
    """Return a page; `has_more` is always there, since a client that misses it asks for ever."""
    page: ListPage[ItemT] = {"object": "list", "data": list(data), "has_more": has_more}
    if with_ids:
        ids = [cast(Mapping[str, Any], item)["id"] for item in data]
        page["first_id"] = ids[0] if ids else None
        page["last_id"] = ids[-1] if ids else None
    return page
