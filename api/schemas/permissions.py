"""What clients say of checkpoint permissions and hear of them."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field
from typing_extensions import TypedDict

from db.tables import CheckpointPermission


class CreatePermissionsBody(BaseModel):
    """Body of POST /v1/fine_tuning/checkpoints/{name}/permissions."""

    model_config = ConfigDict(extra="forbid")
    project_ids: list[Annotated[str, Field(min_length=1, max_length=128)]] = Field(
        min_length=1, max_length=100
    )


class PermissionObject(TypedDict):
    """That a project may call a model."""

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
