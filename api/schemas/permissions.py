"""What clients say of checkpoint permissions and hear of them."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from db.permission_tables import CheckpointPermission


class CreatePermissionsBody(BaseModel):
    """Body of POST /v1/fine_tuning/checkpoints/{name}/permissions."""

    model_config = ConfigDict(extra="forbid")
    project_ids: list[Annotated[str, Field(min_length=1, max_length=128)]] = Field(
        min_length=1, max_length=100
    )


def permission_object(permission: CheckpointPermission) -> dict[str, Any]:
    """Return a permission as clients see it."""
    return {
        "id": permission.id,
        "object": "checkpoint.permission",
        "created_at": int(permission.created_at.timestamp()),
        "project_id": permission.grantee_project_id,
    }
