"""Engine and sessions. `transaction` is the only place that commits."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import create_engine, event
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm import Session, sessionmaker

from db.connection import BoundedConnection, connect
from luthier.core.errors import UnavailableError

_POOL_TIMEOUT_SECONDS = 3
_CONNECT_SECONDS = 2
# A pooled connection that does not answer so soon is dropped, and another one is made.
_PING_SECONDS = 1.5


class Database:
    """A pool of connections to Postgres.

    Args:
        url: `postgresql+psycopg://…`; a plain `postgresql://` is taken as that.
        answer_seconds: how long a statement may take; a database that stalls counts as away after that. None:
            as long as it takes.
    """

    def __init__(self, url: str, *, pool_size: int = 5, answer_seconds: float | None = 4.0) -> None:
        self.engine = create_engine(
            url.replace("postgresql://", "postgresql+psycopg://", 1),
            pool_size=pool_size,
            max_overflow=0,
            pool_timeout=_POOL_TIMEOUT_SECONDS,
            # A log of errors must hold no rows of users and no hashes of keys.
            hide_parameters=True,
            # A database that came back is used again at once, without a failed request per old connection.
            pool_pre_ping=True,
            connect_args={"connect_timeout": _CONNECT_SECONDS},
        )

        @event.listens_for(self.engine, "do_connect")
        def _connect(_dialect: Any, _record: Any, _arguments: Any, options: Any) -> BoundedConnection:
            return connect(answer_seconds=answer_seconds, **options)

        if answer_seconds is not None:
            _bound_ping(self.engine.dialect)
        self._sessions = sessionmaker(self.engine, expire_on_commit=False)

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        """Open a session, commit it at the end, roll it back when the body raises.

        Raises:
            UnavailableError: when the database can't be reached or no connection is free in 3 s; nothing
                was committed, unless the connection broke during the commit itself.
        """
        with _named_unavailable(), self._sessions.begin() as session:
            yield session

    def forget_connections(self) -> None:
        """Drop the pool without closing it: for a process just forked, whose sockets are its parent's."""
        self.engine.dispose(close=False)

    def close(self) -> None:
        """Close every pooled connection."""
        self.engine.dispose()


def _bound_ping(dialect: Any) -> None:
    """Let a check of a pooled connection take no longer than `_PING_SECONDS`."""
    ping = dialect.do_ping

    def do_ping(connection: BoundedConnection) -> bool:
        before, connection.answer_seconds = connection.answer_seconds, _PING_SECONDS
        try:
            return bool(ping(connection))
        finally:
            connection.answer_seconds = before

    dialect.do_ping = do_ping


@contextmanager
def _named_unavailable() -> Iterator[None]:
    try:
        yield
    except (OperationalError, InterfaceError, PoolTimeoutError) as error:
        raise UnavailableError("The database can't be reached right now; try again.") from error
    except DBAPIError as error:
        if error.connection_invalidated:
            raise UnavailableError("The database can't be reached right now; try again.") from error
        raise
