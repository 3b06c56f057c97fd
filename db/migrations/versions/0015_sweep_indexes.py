"""Indexes for what every sweep of every worker asks, and for which jobs read a file.

Stop all workers first: making an index of jobs holds back the renewal of leases.
"""

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0016"
branch_labels = None
depends_on = None

_BYTES_LEFT = sa.text("deleted_at IS NOT NULL AND bytes_deleted_at IS NULL")


def upgrade() -> None:
    op.create_index(
        "ix_jobs_untidied",
        "jobs",
        ["finished_at"],
        postgresql_where=sa.text("finished_at IS NOT NULL AND tidied_at IS NULL"),
    )
    op.create_index("ix_jobs_training_file_id", "jobs", ["training_file_id"])
    op.create_index("ix_jobs_validation_file_id", "jobs", ["validation_file_id"])
    op.create_index("ix_files_undeleted_bytes", "files", ["deleted_at"], postgresql_where=_BYTES_LEFT)
    op.create_index("ix_models_undeleted_bytes", "models", ["deleted_at"], postgresql_where=_BYTES_LEFT)


def downgrade() -> None:
    op.drop_index("ix_models_undeleted_bytes", "models")
    op.drop_index("ix_files_undeleted_bytes", "files")
    op.drop_index("ix_jobs_validation_file_id", "jobs")
    op.drop_index("ix_jobs_training_file_id", "jobs")
    op.drop_index("ix_jobs_untidied", "jobs")
