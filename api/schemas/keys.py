"""What clients say of API keys and hear of them."""

from typing import Literal, NotRequired

from pydantic import BaseModel, ConfigDict, Field
from typing_extensions import TypedDict

from db.tables import ApiKey


class CreateKeyBody(BaseModel):
    """Body of POST /v1/keys; `project` is the name of the project that the key opens, made when new."""

    model_config = ConfigDict(extra="forbid")
    name: str = Field(min_length=1, max_length=64)
    project: str | None = Field(None, min_length=1, max_length=64, pattern=r"^[A-Za-z0-9._-]+$")
    is_admin: bool = Field(False, strict=True)


class KeyObject(TypedDict):
    """An API key; `key` is its plain text, in the answer that made it alone."""

    id: str
    object: Literal["api_key"]
    name: str
    prefix: str
    project: str
    project_id: str
    is_admin: bool
    created_at: int
    last_used_at: int | None
    key: NotRequired[str]


def key_object(key: ApiKey, project_name: str, plain_text: str | None = None) -> KeyObject:
    """Return a key as clients see it; `key` itself is there only in the answer that made it."""
    body: KeyObject = {
        "id": key.id,
        "object": "api_key",
        "name": key.name,
        "prefix": key.prefix,
        "project": project_name,
        "project_id": key.project_id,
        "is_admin": key.is_admin,
        "created_at": int(key.created_at.timestamp()),
        "last_used_at": None if key.last_used_at is None else int(key.last_used_at.timestamp()),
    }
    if plain_text is not None:
        body["key"] = plain_text
    return body
