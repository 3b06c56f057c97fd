"""Models, their files, and the permissions to call them."""

from typing import Annotated, Literal, Self

from pydantic import Field

from api.schemas.base import Absent, Answer, Body, Timestamp, absent_if_none
from db.tables import Alias, Base, Model


class ModelObject(Answer):
    """A name that can be called: a base, a tuned model, a checkpoint, an alias or a name mapped to a base."""

    id: str
    object: Literal["model"] = "model"
    created: Timestamp = Field(validation_alias="created_at")
    owned_by: str
    base_model: str | None
    digest: str
    job: str | Absent = absent_if_none()
    pinned: bool | Absent = absent_if_none()
    context_length: int | Absent = absent_if_none()
    alias_of: str | Absent = absent_if_none()

    @classmethod
    def of_model(cls, model: Model, organization_slug: str) -> Self:
        """Return a tuned model or checkpoint as clients see it."""
        return cls(
            id=model.name,
            created=model.created_at,
            owned_by=organization_slug,
            base_model=model.base_id,
            job=model.job_id,
            digest=model.artifact_digest,
            pinned=model.pinned_at is not None,
        )

    @classmethod
    def of_base(cls, base: Base) -> Self:
        """Return a base model as clients see it."""
        return cls.of(base, owned_by="luthier", base_model=None)

    def as_alias(self, alias: Alias, organization_slug: str) -> Self:
        """Return this model under an alias."""
        return self.model_copy(
            update={
                "id": alias.name,
                "created": int(alias.created_at.timestamp()),
                "owned_by": organization_slug,
                "base_model": self.base_model or self.id,
                "alias_of": self.id,
            }
        )


class ModelFileObject(Answer):
    """A file of a tuned model."""

    name: str
    object: Literal["model.file"] = "model.file"
    bytes: int
    sha256: str


class ModelFilesPage(Answer):
    """The files of a tuned model."""

    object: Literal["list"] = "list"
    digest: str
    data: list[ModelFileObject]
    has_more: Literal[False] = False


class CreatePermissionsBody(Body):
    """Body of POST /v1/fine_tuning/checkpoints/{name}/permissions."""

    project_ids: list[Annotated[str, Field(min_length=1, max_length=128)]] = Field(
        min_length=1, max_length=100
    )


class PermissionObject(Answer):
    """The permission of a project to call a model."""

    id: str
    object: Literal["checkpoint.permission"] = "checkpoint.permission"
    created_at: Timestamp
    project_id: str = Field(validation_alias="grantee_project_id")
