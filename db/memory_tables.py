"""The ledger of memory: devices, and who holds or waits for how much of them."""

from datetime import datetime

from sqlalchemy import func
from sqlalchemy.orm import Mapped, mapped_column

from db.tables import Table


class MemoryDevice(Table):
    """A memory that jobs and serving share. Its row is the lock under which all of it is given out."""

    __tablename__ = "memory_devices"
    hostname: Mapped[str] = mapped_column(primary_key=True)
    # "cpu" or "cuda:N".
    device: Mapped[str] = mapped_column(primary_key=True)
    total_bytes: Mapped[int]
    seen_at: Mapped[datetime] = mapped_column(server_default=func.now())


class MemoryGrant(Table):
    """What one holder has of a device, or waits for. It lapses unless its owner renews it.

    `kind` is `job` or `serving`, `holder_id` a job's id or an inference server's. A job's attempt has its
    lease epoch; a job that waits has epoch 0, no bytes, in `floor_bytes` what it can't start without, and in
    `told` what its events say of why. Of serving, `num_bytes` is what the server has said it will not exceed,
    `floor_bytes` what it can never give back, and `version` the number of the newest ceiling it was told.
    """

    __tablename__ = "memory_grants"
    hostname: Mapped[str] = mapped_column(primary_key=True)
    device: Mapped[str] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(primary_key=True)
    holder_id: Mapped[str] = mapped_column(primary_key=True)
    lease_epoch: Mapped[int] = mapped_column(primary_key=True, server_default="0")
    num_bytes: Mapped[int]
    wanted_bytes: Mapped[int]
    floor_bytes: Mapped[int] = mapped_column(server_default="0")
    version: Mapped[int] = mapped_column(server_default="0")
    told: Mapped[str | None]
    since: Mapped[datetime] = mapped_column(server_default=func.now())
    expires_at: Mapped[datetime]
