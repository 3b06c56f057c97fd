"""Connections to Postgres that never wait for an answer for longer than they may, engine and sessions.

`Database.transaction` is the only place that commits. The server's own timeouts say nothing when the server,
or the way to it, is gone without a word: the kernel then waits for a quarter of an hour, and on a Unix socket
or behind a proxy for ever.
"""

import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import psycopg
from psycopg.abc import PQGen
from sqlalchemy import create_engine, event
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm import Session, sessionmaker

from luthier.core.errors import UnavailableError

RV = TypeVar("RV")

_POOL_TIMEOUT_SECONDS = 3
_CONNECT_SECONDS = 2
# A pooled connection that does not answer so soon is dropped, and another one is made.
_PING_SECONDS = 1.5
# How soon a host that is gone is noticed while nothing is asked; no more than hints on a Unix socket.
KEEPALIVE: dict[str, Any] = {
    "keepalives": 1,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 2,
}
# A transaction whose process stands still gives its locks up.
_IDLE_SECONDS = 30


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
        # No statement changes rows that its session has loaded and reads again.
        self._sessions = sessionmaker(
            self.engine, expire_on_commit=False, execution_options={"synchronize_session": False}
        )

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        """Open a session, commit it at the end, roll it back when the body raises.

        Raises:
            UnavailableError: when the database can't be reached or no connection is free in 3 s; nothing
                was committed, unless the connection broke during the commit itself.
        """
        with _named_unavailable(), self._sessions.begin() as session:
            yield session

    def close(self) -> None:
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


class _NoAnswerError(psycopg.OperationalError):
    """The server has not answered in time; the connection is closed."""


class BoundedConnection(psycopg.Connection[Any]):
    """A connection that is closed, with an error, when a statement has no answer in time."""

    # None: as long as it takes.
    answer_seconds: float | None = None

    def wait(self, gen: PQGen[RV], *arguments: Any, **options: Any) -> RV:
        """Wait for the server as psycopg does, up to `answer_seconds`."""
        if self.answer_seconds is None:
            return super().wait(gen, *arguments, **options)
        try:
            return super().wait(_until(gen, time.monotonic() + self.answer_seconds), *arguments, **options)
        except _NoAnswerError:
            # What it was doing is not known: no statement can follow.
            with suppress(psycopg.Error):
                self.close()
            raise


def connect(*, answer_seconds: float | None, **options: Any) -> BoundedConnection:
    """Connect, with timeouts on both sides.

    Args:
        answer_seconds: how long a statement may take, and wait for a lock; None: as long as it takes.
    """
    server_options = [f"-c idle_in_transaction_session_timeout={_IDLE_SECONDS}s"]
    if answer_seconds is not None:
        milliseconds = int(answer_seconds * 1000)
        server_options += [f"-c statement_timeout={milliseconds}", f"-c lock_timeout={milliseconds * 3 // 4}"]
        options["tcp_user_timeout"] = milliseconds
    # What the URL says of its own comes last, and wins.
    options["options"] = " ".join([*server_options, options.get("options", "")])
    connection = BoundedConnection.connect(**KEEPALIVE, **options)
    connection.answer_seconds = answer_seconds
    return connection


def _until(gen: PQGen[RV], deadline: float) -> Generator[Any, Any, RV]:
    """Pass a generator of psycopg on until a deadline; it is asked at every tenth of a second."""
    try:
        wanted = next(gen)
        while True:
            ready = yield wanted
            if not ready and time.monotonic() > deadline:
                raise _NoAnswerError("the server has not answered in time")
            wanted = gen.send(ready)
    except StopIteration as end:
        result: RV = end.value
        return result
