"""Engine and sessions. `transaction` is the only place that commits."""

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import create_engine
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm import Session, sessionmaker

from luthier.core.errors import UnavailableError

_POOL_TIMEOUT_SECONDS = 3


class Database:
    """A pool of connections to Postgres.

    Args:
        url: `postgresql+psycopg://…`; a plain `postgresql://` is taken as that.
    """

    def __init__(self, url: str, *, pool_size: int = 5) -> None:
        self.engine = create_engine(
            url.replace("postgresql://", "postgresql+psycopg://", 1),
            pool_size=pool_size,
            max_overflow=0,
            pool_timeout=_POOL_TIMEOUT_SECONDS,
            # A log of errors must hold no rows of users and no hashes of keys.
            hide_parameters=True,
            # A database that came back is used again at once, without a failed request per old connection.
            pool_pre_ping=True,
            connect_args={"connect_timeout": _POOL_TIMEOUT_SECONDS},
        )
        self._sessions = sessionmaker(self.engine, expire_on_commit=False)

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        """Open a session, commit it at the end, roll it back when the body raises.

        Raises:
            UnavailableError: when the database can't be reached or no connection is free in 3 s; nothing
                was committed, unless the connection broke during the commit itself.
        """
        with _telling_of_absence(), self._sessions.begin() as session:
            yield session

    def forget_connections(self) -> None:
        """Drop the pool without closing it: for a process just forked, whose sockets are its parent's."""
        self.engine.dispose(close=False)

    def close(self) -> None:
        """Close every pooled connection."""
        self.engine.dispose()


@contextmanager
def _telling_of_absence() -> Iterator[None]:
    try:
        yield
    except (OperationalError, InterfaceError, PoolTimeoutError) as error:
        raise UnavailableError("The database can't be reached right now; try again.") from error
    except DBAPIError as error:
        if error.connection_invalidated:
            raise UnavailableError("The database can't be reached right now; try again.") from error
        raise
