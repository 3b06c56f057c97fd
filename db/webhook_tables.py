"""Webhooks: who is to be told of a job's end, and what is still to be told."""

from datetime import datetime

from sqlalchemy import ForeignKey, Index, func, text
from sqlalchemy.dialects.postgresql import ARRAY, TEXT
from sqlalchemy.orm import Mapped, mapped_column

from db.tables import Owned, Table


class WebhookEndpoint(Owned, Table):
    """A client's receiver. Its secrets are sealed (luthier.core.sealing), empty once there is none."""

    __tablename__ = "webhook_endpoints"
    __table_args__ = (
        Index(
            "ix_webhook_endpoints_page",
            "project_id",
            "created_at",
            "id",
            postgresql_where=text("deleted_at IS NULL"),
        ),
    )
    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    url: Mapped[str]
    event_types: Mapped[list[str]] = mapped_column(ARRAY(TEXT))
    secret: Mapped[str]
    # The end of it, which is shown.
    secret_hint: Mapped[str] = mapped_column(server_default="")
    # The one before, which signs too until its time is over.
    old_secret: Mapped[str | None]
    old_secret_expires_at: Mapped[datetime | None]
    updated_at: Mapped[datetime] = mapped_column(server_default=func.now())


class WebhookDelivery(Owned, Table):
    """One event for one endpoint, written in the transaction in which the job ended.

    `next_try_at` is also the lease: who claims a delivery moves it on and counts the try, and its answer is
    written only while `num_tries` is still that of its claim.
    """

    __tablename__ = "webhook_deliveries"
    __table_args__ = (
        Index("ix_webhook_deliveries_due", "next_try_at", postgresql_where=text("finished_at IS NULL")),
        Index(
            "ix_webhook_deliveries_finished",
            "finished_at",
            postgresql_where=text("finished_at IS NOT NULL"),
        ),
    )
    id: Mapped[str] = mapped_column(primary_key=True)
    endpoint_id: Mapped[str] = mapped_column(ForeignKey("webhook_endpoints.id"), index=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    event_id: Mapped[str]
    event_type: Mapped[str]
    num_tries: Mapped[int] = mapped_column(server_default="0")
    next_try_at: Mapped[datetime] = mapped_column(server_default=func.now())
    finished_at: Mapped[datetime | None]
    # "delivered", "given_up", "endpoint_deleted".
    outcome: Mapped[str | None]
    last_status_code: Mapped[int | None]
    # Our own words, never the receiver's.
    last_error: Mapped[str | None]
