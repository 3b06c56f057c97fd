"""What is shown of a signing secret, which is itself sealed from now on; and which deliveries have finished.

`python -m services.bootstrap` seals the secrets that are there, after this. Stop all workers first: those of
the version before would sign with what they can't open.
"""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("webhook_endpoints", sa.Column("secret_hint", sa.Text(), server_default="", nullable=False))
    op.execute("UPDATE webhook_endpoints SET secret_hint = right(secret, 4)")
    op.create_index(
        "ix_webhook_deliveries_finished",
        "webhook_deliveries",
        ["finished_at"],
        postgresql_where=sa.text("finished_at IS NOT NULL"),
    )


def downgrade() -> None:
    op.drop_index("ix_webhook_deliveries_finished", table_name="webhook_deliveries")
    op.drop_column("webhook_endpoints", "secret_hint")
