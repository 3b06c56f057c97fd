"""Shapes that all routes share: strict bodies, answers made of rows, OpenAI's pages of lists, deletions."""

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any, Generic, Literal, NotRequired, Self, TypeVar, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.json_schema import SkipJsonSchema
from typing_extensions import TypedDict

ItemT = TypeVar("ItemT")


class Body(BaseModel):
    """A request body that refuses unknown fields."""

    model_config = ConfigDict(extra="forbid")


def _to_seconds(moment: Any) -> Any:
    return int(moment.timestamp()) if isinstance(moment, datetime) else moment


Timestamp = Annotated[int, BeforeValidator(_to_seconds)]
"""A moment in Unix seconds."""
Absent = SkipJsonSchema[None]
"""None as the value of a field that is then not in the answer."""


def absent_if_none() -> Any:
    """Return a field that an answer lacks where it is None."""
    return Field(default_factory=lambda: None, exclude_if=lambda value: value is None)


class Answer(BaseModel):
    """An answer that is made of a row; a field's alias is the attribute that it is read from."""

    model_config = ConfigDict(validate_by_name=True, json_schema_serialization_defaults_required=True)

    @classmethod
    def of(cls, row: object, **more: Any) -> Self:
        """Return a row as clients see it, with what it does not hold."""
        names = [str(field.validation_alias or name) for name, field in cls.model_fields.items()]
        read = {name: getattr(row, name) for name in names if name not in more and hasattr(row, name)}
        return cls.model_validate(read | more)


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
        ids = [cast(Any, item).id for item in data]
        page["first_id"] = ids[0] if ids else None
        page["last_id"] = ids[-1] if ids else None
    return page
