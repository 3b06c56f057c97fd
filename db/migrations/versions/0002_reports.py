"""The result file of a job, and a report of two parts: what prepare found and what the run measured.

Stop all workers first: an index is built over `jobs`, and no lease is renewed meanwhile. Not
concurrently, because all migrations run in one transaction, so that one that fails leaves nothing behind.
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("result_file_id", sa.Text(), nullable=True))
    op.create_foreign_key("fk_jobs_result_file_id", "jobs", "files", ["result_file_id"], ["id"])
    op.create_index("ix_jobs_result_file_id", "jobs", ["result_file_id"])
    op.execute(
        "UPDATE jobs SET report = jsonb_build_object('prepare', jsonb_build_object("
        "'training', report -> 'training', 'validation', report -> 'validation', 'tokenize_seconds', 0.0)) "
        "WHERE report ? 'training'"
    )


def downgrade() -> None:
    op.execute(
        "UPDATE jobs SET report = jsonb_build_object("
        "'training', report #> '{prepare,training}', 'validation', report #> '{prepare,validation}') "
        "WHERE report ? 'prepare'"
    )
    op.drop_index("ix_jobs_result_file_id", table_name="jobs")
    op.drop_constraint("fk_jobs_result_file_id", "jobs", type_="foreignkey")
    op.drop_column("jobs", "result_file_id")
