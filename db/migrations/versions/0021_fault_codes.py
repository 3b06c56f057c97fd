"""Tries in a row are counted by the code of what a job met, not by what it waits for."""

import sqlalchemy as sa
from alembic import op

revision = "0021"
down_revision = "0020"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("fault_code", sa.Text(), nullable=True))


def downgrade() -> None:
    op.drop_column("jobs", "fault_code")
