"""Shapes that all routes share: strict request bodies, pages of lists as OpenAI has them, deletions."""

from collections.abc import Mapping, Sequence
from typing import Any, Generic, Literal, NotRequired, TypeVar, cast

from pydantic import BaseModel, ConfigDict
from typing_extensions import TypedDict

ItemT = TypeVar("ItemT")


class Body(BaseModel):
    """A request body that refuses unknown fields."""

    model_config = ConfigDict(extra="forbid")


class ListPage(TypedDict, Generic[ItemT]):
    """A page of a list; `first_id` and `last_id` are present where OpenAI's list has them."""

    object: Literal["list"]
    data: list[ItemT]
    has_more: bool
    first_id: NotRequired[str | None]
    last_id: NotRequired[str | None]


class DeletedObject(TypedDict):
    """The answer to a deletion."""

    id: str
    object: str
    deleted: Literal[True]
    name: NotRequired[str]


def list_object(data: Sequence[ItemT], *, has_more: bool, with_ids: bool = False) -> ListPage[ItemT]:
    """Return a page. `has_more` is always present: a client that misses it pages for ever."""
    page: ListPage[ItemT] = {"object": "list", "data": list(data), "has_more": has_more}
    if with_ids:
        ids = [cast(Mapping[str, Any], item)["id"] for item in data]
        page["first_id"] = ids[0] if ids else None
        page["last_id"] = ids[-1] if ids else None
    return page
