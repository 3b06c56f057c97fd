"""Memory of a device is split by a setting: of its ledger only the grants of jobs are left.

Grants are those of attempts that run; no worker runs while it is applied.
"""

import importlib

import sqlalchemy as sa
from alembic import op

revision = "0020"
down_revision = "0019"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.drop_table("memory_grants")
    op.drop_table("memory_devices")
    op.create_table(
        "memory_grants",
        sa.Column("job_id", sa.Text(), nullable=False),
        sa.Column("lease_epoch", sa.BigInteger(), nullable=False),
        sa.Column("hostname", sa.Text(), nullable=False),
        sa.Column("device", sa.Text(), nullable=False),
        sa.Column("num_bytes", sa.BigInteger(), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("job_id", "lease_epoch", name="pk_memory_grants"),
    )


def downgrade() -> None:
    op.drop_table("memory_grants")
    importlib.import_module("db.migrations.versions.0012_memory").create_tables()
