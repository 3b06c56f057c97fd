"""Aliases and their versions."""

from typing import Any, Literal, Self

from pydantic import Field

from api.schemas.base import Answer, Body, Timestamp
from services.models.aliases import Pointing


class PutAliasBody(Body):
    """Body of PUT /v1/aliases/{name}."""

    model: str = Field(min_length=1, max_length=256)


class RollBackAliasBody(Body):
    """Body of POST /v1/aliases/{name}/rollback; without one, the version before the present one."""

    version: int | None = Field(None, ge=1, le=2**31 - 1, strict=True)


class AliasObject(Answer):
    """A project's own name for a model."""

    id: str
    object: Literal["alias"] = "alias"
    name: str
    model: str | None
    digest: str | None
    version: int
    created_at: Timestamp
    updated_at: Timestamp

    @classmethod
    def of_pointing(cls, pointing: Pointing, **more: Any) -> Self:
        """Return an alias as clients see it."""
        return cls.of(pointing.alias, model=pointing.model, digest=pointing.digest, **more)


class PointedAliasObject(AliasObject):
    """An alias that this request pointed to its model; `proved` as docs/api.md has it."""

    proved: bool | None


class AliasVersionObject(Answer):
    """What an alias pointed to."""

    id: str
    object: Literal["alias.version"] = "alias.version"
    version: int = Field(validation_alias="number")
    model: str | None
    digest: str | None
    restored_version: int | None = Field(validation_alias="restored_number")
    created_at: Timestamp
    created_by_key_id: str | None
