"""The format of a file's rows, so that a create can refuse a file that its method does not learn from.

Files that are there already keep none: their format is found when a job is prepared.
"""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("files", sa.Column("row_format", sa.Text(), nullable=True))


def downgrade() -> None:
    op.drop_column("files", "row_format")
