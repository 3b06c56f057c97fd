"""The tuned models that jobs continue from, and the full models that artifacts are applied to.

Stop all workers first: one of its indexes is built over `jobs`, and no lease is renewed meanwhile. Not
concurrently, because all migrations run in one transaction, so that one that fails leaves nothing behind.
"""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("parent_model_id", sa.Text(), nullable=True))
    op.create_foreign_key("fk_jobs_parent_model_id", "jobs", "models", ["parent_model_id"], ["id"])
    op.create_index("ix_jobs_parent_model_id", "jobs", ["parent_model_id"])
    op.create_index("ix_models_parent_model_id", "models", ["parent_model_id"])
    op.add_column("models", sa.Column("foundation_model_id", sa.Text(), nullable=True))
    op.create_foreign_key(
        "fk_models_foundation_model_id", "models", "models", ["foundation_model_id"], ["id"]
    )
    op.create_index("ix_models_foundation_model_id", "models", ["foundation_model_id"])


def downgrade() -> None:
    op.drop_index("ix_models_foundation_model_id", table_name="models")
    op.drop_constraint("fk_models_foundation_model_id", "models", type_="foreignkey")
    op.drop_column("models", "foundation_model_id")
    op.drop_index("ix_models_parent_model_id", table_name="models")
    op.drop_index("ix_jobs_parent_model_id", table_name="jobs")
    op.drop_constraint("fk_jobs_parent_model_id", "jobs", type_="foreignkey")
    op.drop_column("jobs", "parent_model_id")
