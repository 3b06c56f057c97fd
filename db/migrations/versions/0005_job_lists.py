"""Lists of jobs by metadata, and how often a remembered request had been sent.

Stop all workers first: two of its indexes are built over `jobs`, and no lease is renewed meanwhile. Not
concurrently, because all migrations run in one transaction, so that one that fails leaves nothing behind.
"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column(
        "idempotency_keys", sa.Column("num_retries", sa.BigInteger(), server_default="0", nullable=False)
    )
    op.create_index(
        "ix_jobs_metadata",
        "jobs",
        ["metadata"],
        postgresql_using="gin",
        postgresql_ops={"metadata": "jsonb_path_ops"},
        postgresql_where=sa.text("deleted_at IS NULL"),
    )
    op.create_index(
        "ix_jobs_page_plain",
        "jobs",
        ["project_id", "created_at", "id"],
        postgresql_where=sa.text("deleted_at IS NULL AND metadata IS NULL"),
    )


def downgrade() -> None:
    op.drop_index("ix_jobs_page_plain", table_name="jobs")
    op.drop_index("ix_jobs_metadata", table_name="jobs")
    op.drop_column("idempotency_keys", "num_retries")
