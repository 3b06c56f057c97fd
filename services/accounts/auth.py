"""Principal: the authenticated key of a request and the project that it opens."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Principal:
    """The project a caller may see; None as `key_id` is the service itself."""

    organization_id: str
    organization_slug: str
    project_id: str
    key_id: str | None
    is_admin: bool = False

    def owner_columns(self) -> dict[str, str | None]:
        """Return the columns of a new row that name its owner."""
        return {
            "organization_id": self.organization_id,
            "project_id": self.project_id,
            "created_by_key_id": self.key_id,
        }
