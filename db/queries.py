"""Reads that more than one verb needs. Every read of a tenant's rows names the project."""

from collections.abc import Sequence
from typing import Any, TypeVar

from sqlalchemy import ColumnElement, delete, select, text, tuple_
from sqlalchemy.orm import Session

from db.tables import Alias, Owned
from luthier.core.errors import InvalidValueError

OwnedRow = TypeVar("OwnedRow", bound=Owned)


def find_owned(
    session: Session,
    table: type[OwnedRow],
    project_id: str,
    row_id: str,
    *,
    for_update: bool = False,
    for_share: bool = False,
) -> OwnedRow | None:
    """Return a project's row by id, or None when it is not there, deleted, or another project's.

    The row is locked until the transaction ends when it is asked for: `for_update` against every other
    lock, `for_share` against `for_update` only.
    """
    statement = select(table).where(
        table.id == row_id, table.project_id == project_id, table.deleted_at.is_(None)
    )
    if for_update or for_share:
        statement = statement.with_for_update(read=for_share)
    return session.scalar(statement)


def delete_some(session: Session, table: Any, which: ColumnElement[bool], *, limit: int) -> int:
    """Delete at most `limit` rows that no other transaction has locked; return how many."""
    chosen = select(table.id).where(which).limit(limit).with_for_update(skip_locked=True)
    gone = delete(table).where(table.id.in_(chosen)).returning(table.id)
    return len(session.execute(gone).all())


def find_alias(
    session: Session, project_id: str, name: str, *, for_update: bool = False, for_share: bool = False
) -> Alias | None:
    """Return a project's alias of that name, or None; locked when it is asked for, as by `find_owned`."""
    statement = select(Alias).where(
        Alias.name == name, Alias.project_id == project_id, Alias.deleted_at.is_(None)
    )
    if for_update or for_share:
        statement = statement.with_for_update(read=for_share)
    return session.scalar(statement)


def page(
    session: Session,
    table: type[OwnedRow],
    is_listed: ColumnElement[bool],
    *filters: ColumnElement[bool],
    after: str | None,
    limit: int,
    is_ascending: bool = False,
) -> tuple[Sequence[OwnedRow], bool]:
    """Read one page of undeleted rows by keyset over (created_at, id), which stays right during inserts.

    Args:
        is_listed: which rows the list has, of which the filters leave some.
        after: the id of the row that ended the page before, deleted or not; None for the first page.
        limit: rows of the page; 0 gives an empty page.

    Returns:
        The rows, and whether more follow.

    Raises:
        InvalidValueError: when the list has no row `after`.
    """
    columns = (table.created_at, table.id)
    statement = select(table).where(is_listed, table.deleted_at.is_(None), *filters)
    if after is not None:
        # Looked up in the statement itself: a page, however deep, is one question. And one comparison of
        # rows, not an OR of two: only that one lets the index begin at the cursor.
        place = select(*columns).where(table.id == after, is_listed).correlate(None).scalar_subquery()
        position = tuple_(*columns)
        statement = statement.where(position > place if is_ascending else position < place)
    order = [column.asc() if is_ascending else column.desc() for column in columns]
    rows = session.scalars(statement.order_by(*order).limit(limit + 1)).all()
    if not rows:
        find_cursor(session, table, after, is_listed)
    return rows[:limit], len(rows) > limit


def find_cursor(
    session: Session, table: type[OwnedRow], after: str | None, is_listed: ColumnElement[bool]
) -> OwnedRow | None:
    """Find the row that ended the page before, deleted or not; None for the first page."""
    if after is None:
        return None
    row = session.scalar(select(table).where(table.id == after, is_listed))
    if row is None:
        raise InvalidValueError(
            f"after: {after[:64]!r} is not in this list; send the id that ended the page before.",
            param="after",
        )
    return row


def lock_key(session: Session, key: str) -> None:
    """Hold a named lock until the transaction ends; twins of one request pass one after the other."""
    session.execute(text("SELECT pg_advisory_xact_lock(hashtextextended(:key, 0))"), {"key": key})
