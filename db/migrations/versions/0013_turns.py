"""What attempts were for, by which projects take turns."""

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0015"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("attempts", sa.Column("stage", sa.Text(), server_default="train", nullable=False))
    op.create_index("ix_attempts_turns", "attempts", ["project_id", "stage", "created_at"])


def downgrade() -> None:
    op.drop_index("ix_attempts_turns", "attempts")
    op.drop_column("attempts", "stage")
