"""Aliases: names of a project's own for models, and what each has pointed to."""

from datetime import datetime

from sqlalchemy import CheckConstraint, ForeignKey, Index, UniqueConstraint, func, text
from sqlalchemy.orm import Mapped, mapped_column

from db.tables import Owned, Table


class Alias(Owned, Table):
    """A name that points to a model: to one of `models`, or to a base.

    What it points to is one row, so that whoever reads it sees the old target or the new one.
    """

    __tablename__ = "aliases"
    __table_args__ = (
        Index(
            "uq_aliases_name", "project_id", "name", unique=True, postgresql_where=text("deleted_at IS NULL")
        ),
        Index(
            "ix_aliases_page", "project_id", "created_at", "id", postgresql_where=text("deleted_at IS NULL")
        ),
        Index("ix_aliases_model_id", "model_id", postgresql_where=text("deleted_at IS NULL")),
        CheckConstraint("num_nonnulls(model_id, base_id) = 1", name="ck_aliases_target"),
    )
    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    model_id: Mapped[str | None] = mapped_column(ForeignKey("models.id"))
    base_id: Mapped[str | None]
    # The number of the version that says the same.
    version: Mapped[int]
    updated_at: Mapped[datetime] = mapped_column(server_default=func.now())


class AliasVersion(Owned, Table):
    """One target that an alias was pointed to, by whom and when; append-only, `number` gap-free from 1.

    `digest` is that of the target's weights at the time; `restored_number` the version that a rollback took
    the target from, which is itself no rollback.
    """

    __tablename__ = "alias_versions"
    __table_args__ = (
        UniqueConstraint("alias_id", "number"),
        CheckConstraint("num_nonnulls(model_id, base_id) = 1", name="ck_alias_versions_target"),
    )
    id: Mapped[str] = mapped_column(primary_key=True)
    alias_id: Mapped[str] = mapped_column(ForeignKey("aliases.id"))
    number: Mapped[int]
    model_id: Mapped[str | None] = mapped_column(ForeignKey("models.id"))
    base_id: Mapped[str | None]
    digest: Mapped[str]
    restored_number: Mapped[int | None]
