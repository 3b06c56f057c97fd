"""Aliases and their versions."""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def _target_and_owner(table: str) -> list[sa.schema.SchemaItem]:
    return [
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("model_id", sa.Text(), nullable=True),
        sa.Column("base_id", sa.Text(), nullable=True),
        sa.Column("organization_id", sa.Text(), nullable=False),
        sa.Column("project_id", sa.Text(), nullable=False),
        sa.Column("created_by_key_id", sa.Text(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(
            ["organization_id"], ["organizations.id"], name=f"fk_{table}_organization_id"
        ),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=f"fk_{table}_project_id"),
        sa.ForeignKeyConstraint(["model_id"], ["models.id"], name=f"fk_{table}_model_id"),
        sa.PrimaryKeyConstraint("id", name=f"pk_{table}"),
        sa.CheckConstraint("num_nonnulls(model_id, base_id) = 1", name=f"ck_{table}_target"),
    ]


def upgrade() -> None:
    op.create_table(
        "aliases",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        *_target_and_owner("aliases"),
    )
    undeleted = sa.text("deleted_at IS NULL")
    op.create_index(
        "uq_aliases_name", "aliases", ["project_id", "name"], unique=True, postgresql_where=undeleted
    )
    op.create_index(
        "ix_aliases_page", "aliases", ["project_id", "created_at", "id"], postgresql_where=undeleted
    )
    op.create_index("ix_aliases_model_id", "aliases", ["model_id"], postgresql_where=undeleted)
    op.create_table(
        "alias_versions",
        sa.Column("alias_id", sa.Text(), nullable=False),
        sa.Column("number", sa.BigInteger(), nullable=False),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("restored_number", sa.BigInteger(), nullable=True),
        *_target_and_owner("alias_versions"),
        sa.ForeignKeyConstraint(["alias_id"], ["aliases.id"], name="fk_alias_versions_alias_id"),
        sa.UniqueConstraint("alias_id", "number", name="uq_alias_versions_alias_id_number"),
    )


def downgrade() -> None:
    # Their indexes go with them.
    op.drop_table("alias_versions")
    op.drop_table("aliases")
