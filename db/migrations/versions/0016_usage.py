"""Usage of inference: tokens of the answers, by key and model."""

import sqlalchemy as sa
from alembic import op

revision = "0016"
down_revision = "0012"
branch_labels = None
depends_on = None

_COLUMNS = ("num_requests", "input_tokens", "input_cached_tokens", "output_tokens")


def upgrade() -> None:
    for name in _COLUMNS:
        op.add_column("usage_events", sa.Column(name, sa.BigInteger(), nullable=True))
    op.create_index("ix_usage_events_organization", "usage_events", ["organization_id", "created_at"])


def downgrade() -> None:
    op.drop_index("ix_usage_events_organization", table_name="usage_events")
    for name in _COLUMNS:
        op.drop_column("usage_events", name)
