"""Estimates rest on finished jobs; what was measured of each base by itself is no longer kept.

Stop all workers first: the index on jobs holds back their leases while it is made.
"""

import importlib

import sqlalchemy as sa
from alembic import op

revision = "0018"
down_revision = "0014"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.drop_table("calibrations")
    op.create_index(
        "ix_jobs_speeds",
        "jobs",
        ["base_id", "finished_at"],
        postgresql_where=sa.text("status = 'succeeded'"),
    )


def downgrade() -> None:
    op.drop_index("ix_jobs_speeds", "jobs")
    importlib.import_module("db.migrations.versions.0003_calibrations").upgrade()
