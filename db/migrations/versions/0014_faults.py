"""What faults cost a job, when it is tried again, and which workers are quarantined."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("num_losses", sa.BigInteger(), server_default="0", nullable=False))
    op.add_column("jobs", sa.Column("num_faults", sa.BigInteger(), server_default="0", nullable=False))
    op.add_column(
        "jobs", sa.Column("avoided_workers", JSONB(), server_default=sa.text("'[]'::jsonb"), nullable=False)
    )
    op.add_column("jobs", sa.Column("not_before", sa.DateTime(timezone=True), nullable=True))
    op.add_column("jobs", sa.Column("waits_for", sa.Text(), nullable=True))
    op.add_column(
        "workers", sa.Column("deaths", JSONB(), server_default=sa.text("'[]'::jsonb"), nullable=False)
    )
    op.add_column(
        "workers", sa.Column("num_quarantines", sa.BigInteger(), server_default="0", nullable=False)
    )
    op.add_column("workers", sa.Column("quarantine_reason", sa.Text(), nullable=True))
    op.add_column("workers", sa.Column("quarantined_until", sa.DateTime(timezone=True), nullable=True))


def downgrade() -> None:
    for name in ("quarantined_until", "quarantine_reason", "num_quarantines", "deaths"):
        op.drop_column("workers", name)
    for name in ("waits_for", "not_before", "avoided_workers", "num_faults", "num_losses"):
        op.drop_column("jobs", name)
