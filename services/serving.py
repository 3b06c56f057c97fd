"""Inference servers in the ledger of memory: what each may take, told to it before the ledger counts on it.

A server has no database. A worker on its machine asks what it holds (`MemoryState`), plans a ceiling under
the device's lock, tells the server (`MemoryOrder`), and confirms what the server then says. Until it is
confirmed the higher of the two ceilings counts, so that no job is given what serving may still take.
"""

from datetime import timedelta

from sqlalchemy import delete, func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from db.memory_tables import MemoryGrant
from luthier.core.devices import Device
from luthier.core.inference import MemoryOrder, MemoryState
from services import memory

# A server forgets its ceiling when nobody has told it one for so many leases.
_LEASES_OBEYED = 4


def plan(session: Session, device: Device, state: MemoryState, *, lease_seconds: float) -> MemoryOrder:
    """Settle what a server may take, and count the most that it has or may have until it has agreed.

    It is all that jobs leave, in equal parts where there are several servers. For the first job that waits
    it is lower, where that lets the job start: at once for what the server has idle, and once the job has
    waited for `memory.PATIENCE_SECONDS` for all that it could ever give back.

    Args:
        device: what it holds memory of; locked until the transaction ends.
        lease_seconds: after which its row lapses, unless it is planned again.

    Returns:
        What to tell the server.
    """
    memory.lock_device(session, device)
    rows = session.scalars(select(MemoryGrant).where(memory.is_on(device), MemoryGrant.num_bytes > 0)).all()
    others = [row for row in rows if row.kind == memory.SERVING and row.holder_id != state.server_id]
    jobs_bytes = sum(row.num_bytes for row in rows if row.kind == memory.JOB)
    for_jobs = jobs_bytes + _bytes_for_waiting(session, device, state, others, jobs_bytes)
    left_by_others = device.total_bytes - for_jobs - sum(row.num_bytes for row in others)
    held = state.held_bytes + sum(row.wanted_bytes for row in others)
    fair_share = state.held_bytes + (device.total_bytes - for_jobs - held) // (len(others) + 1)
    max_bytes = max(0, min(left_by_others, fair_share))
    version = _count_until_confirmed(session, device, state, max_bytes, lease_seconds)
    return MemoryOrder(version=version, max_bytes=max_bytes, seconds=_LEASES_OBEYED * lease_seconds)


def _bytes_for_waiting(
    session: Session, device: Device, state: MemoryState, others: list[MemoryGrant], jobs_bytes: int
) -> int:
    """Return what the first waiting job asks for, if serving can make it start."""
    waiting: MemoryGrant | None = session.scalar(memory.find_waiting(device).limit(1))
    if waiting is None:
        return 0
    needed = sum(row.wanted_bytes for row in others) + state.held_bytes - state.idle_bytes
    left = device.total_bytes - jobs_bytes - waiting.wanted_bytes
    if left >= needed:
        return waiting.wanted_bytes
    if jobs_bytes == 0 and waiting.floor_bytes < waiting.wanted_bytes:
        # Its number is rough: it starts with less.
        return max(0, device.total_bytes - needed)
    waited_seconds = session.scalar(select(func.extract("epoch", func.now() - waiting.since))) or 0.0
    if (
        waited_seconds > memory.PATIENCE_SECONDS
        and left >= sum(row.floor_bytes for row in others) + state.floor_bytes
    ):
        return waiting.wanted_bytes
    return 0


def _count_until_confirmed(
    session: Session, device: Device, state: MemoryState, max_bytes: int, lease_seconds: float
) -> int:
    """Write the most that a server has or may have by now; return the number of its new ceiling."""
    key = memory.key_of(device, memory.SERVING, state.server_id)
    most = max(max_bytes, state.held_bytes)
    values = {
        "wanted_bytes": state.held_bytes,
        "floor_bytes": state.floor_bytes,
        "expires_at": func.now() + timedelta(seconds=lease_seconds),
    }
    version: int = session.execute(
        insert(MemoryGrant)
        .values(**key, **values, num_bytes=most, version=state.version + 1)
        .on_conflict_do_update(
            index_elements=list(key),
            set_=values
            | {
                "num_bytes": func.greatest(MemoryGrant.num_bytes, most),
                "version": func.greatest(MemoryGrant.version, state.version) + 1,
            },
        )
        .returning(MemoryGrant.version)
    ).scalar_one()
    return version


def confirm(session: Session, device: Device, state: MemoryState, order: MemoryOrder) -> None:
    """Count what a server agreed to, unless it was told something newer meanwhile."""
    if state.version != order.version:
        return
    session.execute(
        update(MemoryGrant)
        .filter_by(**memory.key_of(device, memory.SERVING, state.server_id), version=order.version)
        .values(
            num_bytes=max(order.max_bytes, state.held_bytes),
            wanted_bytes=state.held_bytes,
            floor_bytes=state.floor_bytes,
        )
        .execution_options(synchronize_session=False)
    )


def forget_all(session: Session) -> None:
    """Take every server out of the ledger; only while no worker runs, which would enter those that do."""
    session.execute(
        delete(MemoryGrant)
        .where(MemoryGrant.kind == memory.SERVING)
        .execution_options(synchronize_session=False)
    )


def forget(session: Session, device: Device, server_id: str) -> None:
    """Take a server out of the ledger whose process has ended."""
    session.execute(
        delete(MemoryGrant)
        .filter_by(**memory.key_of(device, memory.SERVING, server_id))
        .execution_options(synchronize_session=False)
    )
