"""Memory of devices that jobs hold."""

from datetime import datetime

from sqlalchemy.orm import Mapped, mapped_column

from db.tables import Table


class MemoryGrant(Table):
    """What an attempt has of training's part of a device; it lapses unless it is renewed with its lease."""

    __tablename__ = "memory_grants"
    job_id: Mapped[str] = mapped_column(primary_key=True)
    lease_epoch: Mapped[int] = mapped_column(primary_key=True)
    hostname: Mapped[str]
    device: Mapped[str]
    num_bytes: Mapped[int]
    expires_at: Mapped[datetime]
