"""Checkpoint permissions: who beside its owner may call a tuned model."""

from sqlalchemy import ForeignKey, Index, text
from sqlalchemy.orm import Mapped, mapped_column

from db.tables import Owned, Table


class CheckpointPermission(Owned, Table):
    """The right of another project to call a model; `project_id` is the owner's, as everywhere."""

    __tablename__ = "checkpoint_permissions"
    __table_args__ = (
        Index(
            "uq_checkpoint_permissions_grantee",
            "model_id",
            "grantee_project_id",
            unique=True,
            postgresql_where=text("deleted_at IS NULL"),
        ),
        Index(
            "ix_checkpoint_permissions_grantee",
            "grantee_project_id",
            postgresql_where=text("deleted_at IS NULL"),
        ),
    )
    id: Mapped[str] = mapped_column(primary_key=True)
    model_id: Mapped[str] = mapped_column(ForeignKey("models.id"))
    grantee_project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
