"""Aliases and their versions."""

from typing import Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from api.schemas.base import Body
from services.models.aliases import PastPointing, Pointing


class PutAliasBody(Body):
    """Body of PUT /v1/aliases/{name}."""

    model: str = Field(min_length=1, max_length=256)


class RollBackAliasBody(Body):
    """Body of POST /v1/aliases/{name}/rollback; without one, the version before the present one."""

    version: int | None = Field(None, ge=1, le=2**31 - 1, strict=True)


class AliasObject(TypedDict):
    """A project's own name for a model; `proved` is in the answers that pointed it, see docs/api.md."""

    id: str
    object: Literal["alias"]
    name: str
    model: str | None
    digest: str | None
    version: int
    created_at: int
    updated_at: int
    proved: NotRequired[bool | None]


class AliasVersionObject(TypedDict):
    """What an alias pointed to."""

    id: str
    object: Literal["alias.version"]
    version: int
    model: str | None
    digest: str | None
    restored_version: int | None
    created_at: int
    created_by_key_id: str | None


def alias_object(pointing: Pointing) -> AliasObject:
    """Return an alias as clients see it."""
    alias = pointing.alias
    return {
        "id": alias.id,
        "object": "alias",
        "name": alias.name,
        "model": pointing.model,
        "digest": pointing.digest,
        "version": alias.version,
        "created_at": int(alias.created_at.timestamp()),
        "updated_at": int(alias.updated_at.timestamp()),
    }


def alias_version_object(past: PastPointing) -> AliasVersionObject:
    """Return a version of an alias as clients see it."""
    version = past.version
    return {
        "id": version.id,
        "object": "alias.version",
        "version": version.number,
        "model": past.model,
        "digest": version.digest,
        "restored_version": version.restored_number,
        "created_at": int(version.created_at.timestamp()),
        "created_by_key_id": version.created_by_key_id,
    }
