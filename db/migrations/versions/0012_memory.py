"""The ledger of memory, and what jobs need of it."""

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    create_tables()
    op.add_column("jobs", sa.Column("peak_bytes", sa.BigInteger(), nullable=True))
    op.add_column("jobs", sa.Column("least_bytes", sa.BigInteger(), nullable=True))


def create_tables() -> None:
    op.create_table(
        "memory_devices",
        sa.Column("hostname", sa.Text(), nullable=False),
        sa.Column("device", sa.Text(), nullable=False),
        sa.Column("total_bytes", sa.BigInteger(), nullable=False),
        sa.Column("seen_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("hostname", "device", name="pk_memory_devices"),
    )
    op.create_table(
        "memory_grants",
        sa.Column("hostname", sa.Text(), nullable=False),
        sa.Column("device", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("holder_id", sa.Text(), nullable=False),
        sa.Column("lease_epoch", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("num_bytes", sa.BigInteger(), nullable=False),
        sa.Column("wanted_bytes", sa.BigInteger(), nullable=False),
        sa.Column("floor_bytes", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("version", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("told", sa.Text(), nullable=True),
        sa.Column("since", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint(
            "hostname", "device", "kind", "holder_id", "lease_epoch", name="pk_memory_grants"
        ),
    )


def downgrade() -> None:
    op.drop_column("jobs", "least_bytes")
    op.drop_column("jobs", "peak_bytes")
    op.drop_table("memory_grants")
    op.drop_table("memory_devices")
