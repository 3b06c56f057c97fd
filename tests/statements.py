"""What a database is asked."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import event, text

from db.session import Database


@contextmanager
def counted(database: Database) -> Iterator[list[str]]:
    """Note every statement of the block."""
    statements: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        statements.append(statement)

    event.listen(database.engine, "before_cursor_execute", note)
    try:
        yield statements
    finally:
        event.remove(database.engine, "before_cursor_execute", note)


def is_one_waiting(database: Database) -> bool:
    """Whether a statement waits for another transaction's lock."""
    waiting = (
        "SELECT count(*) FROM pg_locks JOIN pg_stat_activity USING (pid) "
        "WHERE NOT granted AND datname = current_database()"
    )
    with database.engine.connect() as connection:
        return bool(connection.execute(text(waiting)).scalar_one())
