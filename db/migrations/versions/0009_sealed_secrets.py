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
    # The version before signs with what it reads, so a sealed or an empty secret would be its key. Rotating
    # does not help: the version that is installed seals the new secret too.
    unusable = (
        op.get_bind()
        .scalars(
            sa.text(
                "SELECT id FROM webhook_endpoints"
                " WHERE (NOT starts_with(secret, 'whsec_') AND (secret <> '' OR deleted_at IS NULL))"
                " OR (old_secret <> '' AND NOT starts_with(old_secret, 'whsec_')) ORDER BY id"
            )
        )
        .all()
    )
    if unusable:
        raise RuntimeError(
            f"{len(unusable)} webhook endpoints have secrets that the version before can't sign with. Delete "
            f"these endpoints first, and create them anew after the downgrade: {', '.join(unusable)}"
        )
    op.drop_index("ix_webhook_deliveries_finished", table_name="webhook_deliveries")
    op.drop_column("webhook_endpoints", "secret_hint")
