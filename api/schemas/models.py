"""Models, their files, and the permissions to call them."""

from typing import Annotated, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from api.schemas.base import Body
from db.tables import Alias, Base, CheckpointPermission, Model
from luthier.storage.manifests import Manifest


class ModelObject(TypedDict):
    """A name that can be called: a base, a tuned model, a checkpoint, an alias or a name mapped to a base."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    base_model: str | None
    digest: str
    job: NotRequired[str]
    pinned: NotRequired[bool]
    context_length: NotRequired[int]
    alias_of: NotRequired[str]


class ModelFileObject(TypedDict):
    """A file of a tuned model."""

    name: str
    object: Literal["model.file"]
    bytes: int
    sha256: str


class ModelFilesPage(TypedDict):
    """The files of a tuned model."""

    object: Literal["list"]
    digest: str
    data: list[ModelFileObject]
    has_more: Literal[False]


def tuned_model_object(model: Model, organization_slug: str) -> ModelObject:
    """Return a tuned model or checkpoint as clients see it."""
    return {
        "id": model.name,
        "object": "model",
        "created": int(model.created_at.timestamp()),
        "owned_by": organization_slug,
        "base_model": model.base_id,
        "job": model.job_id,
        "digest": model.artifact_digest,
        "pinned": model.pinned_at is not None,
    }


def base_model_object(base: Base) -> ModelObject:
    """Return a base model as clients see it."""
    return {
        "id": base.id,
        "object": "model",
        "created": int(base.created_at.timestamp()),
        "owned_by": "luthier",
        "base_model": None,
        "context_length": base.context_length,
        "digest": base.digest,
    }


def aliased_object(alias: Alias, target: ModelObject, organization_slug: str) -> ModelObject:
    """Return an alias as a callable model: its target's object and name."""
    return {
        **target,
        "id": alias.name,
        "created": int(alias.created_at.timestamp()),
        "owned_by": organization_slug,
        "base_model": target["base_model"] or target["id"],
        "alias_of": target["id"],
    }


def model_files_object(manifest: Manifest) -> ModelFilesPage:
    """Return the list of an artifact's files, without the manifest."""
    return {
        "object": "list",
        "digest": manifest.digest,
        "data": [
            {"name": name, "object": "model.file", "bytes": entry.bytes, "sha256": entry.sha256}
            for name, entry in sorted(manifest.files.items())
        ],
        "has_more": False,
    }


class CreatePermissionsBody(Body):
    """Body of POST /v1/fine_tuning/checkpoints/{name}/permissions."""

    project_ids: list[Annotated[str, Field(min_length=1, max_length=128)]] = Field(
        min_length=1, max_length=100
    )


class PermissionObject(TypedDict):
    """The permission of a project to call a model."""

    id: str
    object: Literal["checkpoint.permission"]
    created_at: int
    project_id: str


def permission_object(permission: CheckpointPermission) -> PermissionObject:
    """Return a permission as clients see it."""
    return {
        "id": permission.id,
        "object": "checkpoint.permission",
        "created_at": int(permission.created_at.timestamp()),
        "project_id": permission.grantee_project_id,
    }
