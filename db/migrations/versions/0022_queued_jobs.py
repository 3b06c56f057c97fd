"""The jobs of a project that wait are counted by an index of their own, not among all its jobs.

Stop all workers first: the index on jobs holds back their leases while it is made.
"""

import sqlalchemy as sa
from alembic import op

revision = "0022"
down_revision = "0021"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index(
        "ix_jobs_waiting",
        "jobs",
        ["project_id"],
        postgresql_where=sa.text("status IN ('validating_files', 'queued', 'paused')"),
    )


def downgrade() -> None:
    op.drop_index("ix_jobs_waiting", "jobs")
